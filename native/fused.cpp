// Small ops in one pass over memory. The definitions are in respike.ops: norm, gated, rotary.
#include <algorithm>

#include "kernels.hpp"
#include "pool.hpp"
#include "vec.hpp"

namespace respike {
using std::int64_t;
}

#define RESPIKE_KERNELS "fused_kernels.inc"
#include "each_level.hpp"

namespace respike {
namespace {

template <class T>
struct Kernels {
  void (*swiglu_row)(const T*, const T*, T*, int64_t);
  void (*add_row)(const T*, const T*, T*, int64_t);
  void (*rotate_head)(const T*, const float*, const float*, T*, int64_t);
};

template <class T>
Kernels<T> kernels_for([[maybe_unused]] Level level) {
#if RESPIKE_X86
  if (level >= Level::avx512) {
    return {avx512::swiglu_row<T>, avx512::add_row<T>, avx512::rotate_head<T>};
  }
  if (level >= Level::avx2) return {avx2::swiglu_row<T>, avx2::add_row<T>, avx2::rotate_head<T>};
#endif
  return {portable::swiglu_row<T>, portable::add_row<T>, portable::rotate_head<T>};
}

// row(index) for every row.
template <class Row>
void each_row(int threads, int64_t rows, int64_t cols, const Row& row) {
  each_part(threads, rows, cols, [&](int64_t first, int64_t end) {
    for (int64_t r = first; r < end; ++r) row(r);
  });
}

}  // namespace

template <class T>
void add_rms_norm(Level level, int threads, const T* x, const T* residual, const T* weight, T* sum,
                  T* out, int64_t rows, int64_t cols, float eps) {
  const Kernels<T> kernels = kernels_for<T>(level);
  each_row(threads, rows, cols, [&](int64_t r) {
    const int64_t at = r * cols;
    kernels.add_row(x + at, residual + at, sum + at, cols);
    rms_norm(level, 1, sum + at, weight, out + at, 1, cols, eps);
  });
}

template <class T>
void add(Level level, int threads, const T* x, const T* y, T* out, int64_t rows, int64_t cols) {
  const Kernels<T> kernels = kernels_for<T>(level);
  each_row(threads, rows, cols, [&](int64_t r) {
    const int64_t at = r * cols;
    kernels.add_row(x + at, y + at, out + at, cols);
  });
}

template <class T>
void swiglu(Level level, int threads, const T* gate, int64_t gate_stride, const T* up,
            int64_t up_stride, T* out, int64_t rows, int64_t cols) {
  const Kernels<T> kernels = kernels_for<T>(level);
  each_row(threads, rows, cols, [&](int64_t r) {
    kernels.swiglu_row(gate + r * gate_stride, up + r * up_stride, out + r * cols, cols);
  });
}

template <class T>
void rotate(Level level, int threads, const T* x, int64_t stride, const float* cos,
            const float* sin, T* out, int64_t out_stride, int64_t tokens, int64_t heads,
            int64_t half) {
  const Kernels<T> kernels = kernels_for<T>(level);
  each_row(threads, tokens, 2 * heads * half, [&](int64_t t) {
    for (int64_t at = 0; at < 2 * heads * half; at += 2 * half) {
      kernels.rotate_head(x + t * stride + at, cos + t * half, sin + t * half,
                          out + t * out_stride + at, half);
    }
  });
}

#define RESPIKE_FOR(T)                                                                           \
  template void add_rms_norm(Level, int, const T*, const T*, const T*, T*, T*, int64_t, int64_t, \
                             float);                                                             \
  template void add(Level, int, const T*, const T*, T*, int64_t, int64_t);                       \
  template void swiglu(Level, int, const T*, int64_t, const T*, int64_t, T*, int64_t, int64_t);  \
  template void rotate(Level, int, const T*, int64_t, const float*, const float*, T*, int64_t,   \
                       int64_t, int64_t, int64_t);
RESPIKE_FOR(float)
RESPIKE_FOR(bf16)
#undef RESPIKE_FOR

}  // namespace respike
