// Rounding weights to int4. The definition is respike.ops.packed.quantise.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.hpp"
#include "pool.hpp"
#include "vec.hpp"

namespace respike {

using std::int64_t;

namespace {

constexpr int lanes = 16;
constexpr int max_group = 128;
constexpr float rounder = 12582912.0f;  // 1.5 * 2^23
constexpr int64_t task_rows = 16;

// To nearest, ties to even; beyond the range infinity.
std::uint16_t float_to_half(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
  const float size = std::fabs(value);
  if (size >= 65520.0f) return static_cast<std::uint16_t>(sign | 0x7c00);
  if (size < 6.103515625e-5f) {  // subnormal: units of 2^-24; the sum rounds to even
    const float units = size * 16777216.0f + 8388608.0f;
    std::memcpy(&bits, &units, sizeof bits);
    return static_cast<std::uint16_t>(sign | (bits & 0x7fff));
  }
  bits = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1) - (112u << 23);
  return static_cast<std::uint16_t>(sign | bits >> 13);
}

}  // namespace
}  // namespace respike

#define RESPIKE_KERNELS "quantise_kernels.inc"
#include "each_level.hpp"

namespace respike {

void search_int4(Level level, int threads, const float* weights, int64_t rows, int64_t cols,
                 int64_t group, const float* steps, int64_t num_steps, std::int8_t* integers,
                 std::uint16_t* scales) {
  auto search = portable::search_group;
#if RESPIKE_X86
  if (level >= Level::avx2) search = avx2::search_group;
  if (level >= Level::avx512) search = avx512::search_group;
#else
  static_cast<void>(level);
#endif
  const int64_t groups = (cols + group - 1) / group;
  parallel_for(threads, (rows + task_rows - 1) / task_rows, [&](int64_t task, int) {
    const int64_t last = std::min(rows, (task + 1) * task_rows);
    for (int64_t row = task * task_rows; row < last; ++row) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t from = row * cols + g * group;
        const int64_t wanted = std::min(group, cols - g * group);
        float padded[max_group] = {};
        std::copy_n(weights + from, wanted, padded);
        scales[row * groups + g] =
            search(padded, static_cast<int>(group), steps, static_cast<int>(num_steps),
                   integers + from, static_cast<int>(wanted));
      }
    }
  });
}

}  // namespace respike
