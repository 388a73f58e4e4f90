// Packed linear layers with x as it is: the kernels of every level. x is read as float32, or as
// bfloat16 where that multiplies faster.
#include <algorithm>
#include <stdexcept>

#include "linear.hpp"
#include "vec.hpp"

#define RESPIKE_KERNELS "linear_kernels.inc"
#include "each_level.hpp"
#include "linear_pairs.hpp"

namespace respike {
namespace {

template <class Kind>
ExactKernels kernels_of([[maybe_unused]] Level level) {
#if RESPIKE_X86
  if (level >= Level::avx512) {
    ExactKernels kernels{avx512::few_rows<Kind>, avx512::many_rows<Kind>, nullptr};
    if constexpr (!std::is_same_v<Kind, WeightF32>) {
      if (level >= Level::avx512bf16) kernels.many_pairs = avx512::many_pairs<Kind>;
      if (level == Level::amx) kernels.many_pairs = avx512::many_pairs<Kind, HardwareTiles<bf16>>;
      if (level == Level::amx_model) {
        kernels.many_pairs = avx512::many_pairs<Kind, ModelTiles<bf16>>;
      }
    }
    return kernels;
  }
  if (level >= Level::avx2) return {avx2::few_rows<Kind>, avx2::many_rows<Kind>, nullptr};
#endif
  return {portable::few_rows<Kind>, portable::many_rows<Kind>, nullptr};
}

}  // namespace

ExactKernels exact_kernels(Level level, Kind kind) {
  switch (kind) {
    case Kind::f32: return kernels_of<WeightF32>(level);
    case Kind::bf16: return kernels_of<WeightBF16>(level);
    case Kind::int8: return kernels_of<WeightInt8>(level);
    case Kind::int4: return kernels_of<WeightInt4>(level);
  }
  throw std::invalid_argument("unknown kind of packed weights");
}

template <class T>
Finish<T> finish_kernel([[maybe_unused]] Level level) {
#if RESPIKE_X86
  if (level >= Level::avx512) return avx512::finish<T>;
  if (level >= Level::avx2) return avx2::finish<T>;
#endif
  return portable::finish<T>;
}

template Finish<float> finish_kernel(Level);
template Finish<bf16> finish_kernel(Level);

}  // namespace respike
