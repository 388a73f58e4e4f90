// RMSNorm over rows. The definition is respike.ops.norm.rms_norm_definition.
#include <cmath>

#include "kernels.hpp"
#include "pool.hpp"

namespace respike {
namespace {

using std::int64_t;

inline float inverse_rms(float sum_of_squares, int64_t cols, float eps) {
  return 1.0f / std::sqrt(sum_of_squares / static_cast<float>(cols) + eps);
}

// The last elements of a row, for levels whose vectors do not divide it.
template <class T>
inline void scale_tail(const T* x, const T* weight, T* out, int64_t from, int64_t cols,
                       float inverse) {
  for (int64_t i = from; i < cols; ++i) {
    store(out + i, load(weight + i) * round_as<T>(load(x + i) * inverse));
  }
}

template <class T>
void row_portable(const T* x, const T* weight, T* out, int64_t cols, float eps) {
  // Independent partial sums: shorter rounding chains, and the compiler may vectorise them.
  constexpr int64_t lanes = 16;
  float partial[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= cols; i += lanes) {
    for (int64_t j = 0; j < lanes; ++j) {
      const float value = load(x + i + j);
      partial[j] += value * value;
    }
  }
  float sum = 0.0f;
  for (; i < cols; ++i) sum += load(x + i) * load(x + i);
  for (const float value : partial) sum += value;
  scale_tail(x, weight, out, 0, cols, inverse_rms(sum, cols, eps));
}

#if RESPIKE_X86

template <class T>
RESPIKE_AVX2 void row_avx2(const T* x, const T* weight, T* out, int64_t cols, float eps) {
  __m256 even = _mm256_setzero_ps();
  __m256 odd = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 16 <= cols; i += 16) {
    const __m256 a = load8(x + i);
    const __m256 b = load8(x + i + 8);
    even = _mm256_fmadd_ps(a, a, even);
    odd = _mm256_fmadd_ps(b, b, odd);
  }
  float sum = sum8(_mm256_add_ps(even, odd));
  for (; i < cols; ++i) sum += load(x + i) * load(x + i);

  const float inverse = inverse_rms(sum, cols, eps);
  const __m256 factor = _mm256_set1_ps(inverse);
  for (i = 0; i + 8 <= cols; i += 8) {
    const __m256 normed = round_as8(x, _mm256_mul_ps(load8(x + i), factor));
    store8(out + i, _mm256_mul_ps(load8(weight + i), normed));
  }
  scale_tail(x, weight, out, i, cols, inverse);
}

template <class T>
RESPIKE_AVX512 void row_avx512(const T* x, const T* weight, T* out, int64_t cols, float eps) {
  constexpr __mmask16 all = 0xffff;
  const __mmask16 rest = static_cast<__mmask16>((1u << (cols % 16)) - 1);
  const int64_t whole = cols - cols % 16;

  __m512 even = _mm512_setzero_ps();
  __m512 odd = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 32 <= whole; i += 32) {
    const __m512 a = load16(x + i, all);
    const __m512 b = load16(x + i + 16, all);
    even = _mm512_fmadd_ps(a, a, even);
    odd = _mm512_fmadd_ps(b, b, odd);
  }
  for (; i < cols; i += 16) {
    const __m512 a = load16(x + i, i < whole ? all : rest);
    even = _mm512_fmadd_ps(a, a, even);
  }
  const float sum = _mm512_reduce_add_ps(_mm512_add_ps(even, odd));

  const __m512 factor = _mm512_set1_ps(inverse_rms(sum, cols, eps));
  for (i = 0; i < cols; i += 16) {
    const __mmask16 lanes = i < whole ? all : rest;
    const __m512 normed = round_as16(x, _mm512_mul_ps(load16(x + i, lanes), factor));
    store16(out + i, lanes, _mm512_mul_ps(load16(weight + i, lanes), normed));
  }
}

#endif  // RESPIKE_X86

template <class T>
using RowKernel = void (*)(const T*, const T*, T*, int64_t, float);

template <class T>
RowKernel<T> row_kernel([[maybe_unused]] Level level) {
#if RESPIKE_X86
  if (level >= Level::avx512) return row_avx512<T>;
  if (level >= Level::avx2) return row_avx2<T>;
#endif
  return row_portable<T>;
}

}  // namespace

template <class T>
void rms_norm(Level level, int threads, const T* x, const T* weight, T* out, int64_t rows,
              int64_t cols, float eps) {
  const RowKernel<T> row = row_kernel<T>(level);
  each_part(threads, rows, cols, [&](int64_t first, int64_t end) {
    for (int64_t r = first; r < end; ++r) row(x + r * cols, weight, out + r * cols, cols, eps);
  });
}

template void rms_norm(Level, int, const float*, const float*, float*, int64_t, int64_t, float);
template void rms_norm(Level, int, const bf16*, const bf16*, bf16*, int64_t, int64_t, float);

}  // namespace respike
