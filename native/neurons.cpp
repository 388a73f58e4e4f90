// Neurons: thresholds and counts of rows. The definition is respike.ops.spikes.fire_definition.
#include <cmath>
#include <limits>

#include "pool.hpp"
#include "spikes.hpp"
#include "vec.hpp"

namespace respike {

using std::int64_t;

namespace {

constexpr float least_adaptive_step = 1e-5f;
constexpr float most_absmax_count = 127.0f;

}  // namespace
}  // namespace respike

#define RESPIKE_KERNELS "neurons_kernels.inc"
#include "each_level.hpp"

namespace respike {
namespace {

template <class T>
using FireRow = void (*)(const T*, int64_t, const Neurons&, float*, std::int32_t*, float*);

template <class T>
FireRow<T> kernel_of([[maybe_unused]] Level level) {
#if RESPIKE_X86
  if (level >= Level::avx512) return avx512::fire_row<T>;
  if (level >= Level::avx2) return avx2::fire_row<T>;
#endif
  return portable::fire_row<T>;
}

}  // namespace

template <class T>
void fire(Level level, int threads, const T* x, int64_t rows, int64_t inputs,
          const Neurons& neurons, std::int32_t* counts, float* steps) {
  const FireRow<T> row = kernel_of<T>(level);
  each_part(threads, rows, inputs, [&](int64_t from, int64_t to) {
    thread_local std::vector<float> sizes;
    if (static_cast<int64_t>(sizes.size()) < inputs) sizes.resize(static_cast<std::size_t>(inputs));
    for (int64_t m = from; m < to; ++m) {
      row(x + m * inputs, inputs, neurons, sizes.data(), counts + m * inputs, steps + m);
    }
  });
}

template void fire(Level, int, const float*, int64_t, int64_t, const Neurons&, std::int32_t*,
                   float*);
template void fire(Level, int, const bf16*, int64_t, int64_t, const Neurons&, std::int32_t*,
                   float*);

}  // namespace respike
