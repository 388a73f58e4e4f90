// Packed linear layers with x rounded to int8: the kernels of every level.
#include <algorithm>
#include <cmath>
#include <limits>

#include "amx.hpp"
#include "linear.hpp"
#include "quads.hpp"

#define RESPIKE_KERNELS "linear_rounded.inc"
#include "each_level.hpp"

#if RESPIKE_X86
#define RESPIKE_LEVEL avx512bf16
#define RESPIKE_TARGET RESPIKE_AVX512BF16
#include "linear_rounded.inc"
#undef RESPIKE_LEVEL
#undef RESPIKE_TARGET
#endif

namespace respike {
namespace {

template <class Kind>
RoundedKernel kernel_of([[maybe_unused]] Level level, [[maybe_unused]] int64_t rows) {
#if RESPIKE_X86
  if (level == Level::amx && rows > few) {
    return avx512bf16::multiply_rounded<Kind, HardwareTiles<std::int8_t>>;
  }
  if (level == Level::amx_model && rows > few) {
    return avx512bf16::multiply_rounded<Kind, ModelTiles<std::int8_t>>;
  }
  if (level >= Level::avx512bf16) return avx512bf16::multiply_rounded<Kind>;
  if (level >= Level::avx512) return avx512::multiply_rounded<Kind>;
  if (level >= Level::avx2) return avx2::multiply_rounded<Kind>;
#endif
  return portable::multiply_rounded<Kind>;
}

}  // namespace

RoundedKernel rounded_kernel(Level level, Kind kind, int64_t rows) {
  if (kind == Kind::int8) return kernel_of<WeightInt8>(level, rows);
  if (kind == Kind::int4) return kernel_of<WeightInt4>(level, rows);
  return nullptr;
}

template <class T>
RoundRow<T> round_row_kernel([[maybe_unused]] Level level) {
#if RESPIKE_X86
  if (level >= Level::avx512) return avx512::round_row<T>;
  if (level >= Level::avx2) return avx2::round_row<T>;
#endif
  return portable::round_row<T>;
}

template RoundRow<float> round_row_kernel(Level);
template RoundRow<bf16> round_row_kernel(Level);

}  // namespace respike
