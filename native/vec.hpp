// Float32 vectors of every level under one set of names, so that a kernel is written once.
//
// A kernel file is included once for each level, by each_level.hpp, in the level's namespace:
// V is its vector, width its number of lanes. weights() reads lanes [column, column + width) of a
// packed row, before scaling.
#pragma once

#include <cmath>

#include "packed.hpp"

#if defined(__GNUC__)
#define RESPIKE_INLINE inline __attribute__((always_inline))
#else
#define RESPIKE_INLINE inline
#endif

// Before a loop of few and constant turns: one after the other, without a counter.
#if defined(__clang__)
#define RESPIKE_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define RESPIKE_UNROLL _Pragma("GCC unroll 8")
#else
#define RESPIKE_UNROLL
#endif

namespace respike {

// ---- portable: the compiler makes of it what it can

namespace portable {

constexpr int width = 8;
struct V {
  float lane[width];
};

template <class F>
RESPIKE_INLINE V each(const F& f) {
  V v;
  for (int i = 0; i < width; ++i) v.lane[i] = f(i);
  return v;
}

RESPIKE_INLINE V same(float value) {
  return each([value](int) { return value; });
}
template <class T>
RESPIKE_INLINE V get(const T* p) {
  return each([p](int i) { return load(p + i); });
}
RESPIKE_INLINE V get_half(const std::uint16_t* p) {
  return each([p](int i) { return half_to_float(p[i]); });
}
template <class T>
RESPIKE_INLINE void put(T* p, const V& v) {
  for (int i = 0; i < width; ++i) store(p + i, v.lane[i]);
}
template <class T>
RESPIKE_INLINE V rounded(const T*, const V& v) {
  return each([&v](int i) { return round_as<T>(v.lane[i]); });
}
RESPIKE_INLINE V add(const V& a, const V& b) {
  return each([&](int i) { return a.lane[i] + b.lane[i]; });
}
RESPIKE_INLINE V mul(const V& a, const V& b) {
  return each([&](int i) { return a.lane[i] * b.lane[i]; });
}
RESPIKE_INLINE V fma(const V& a, const V& b, const V& c) {
  return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
// a * b - c * d, and x / (1 + exp(-x)).
RESPIKE_INLINE V cross(const V& a, const V& b, const V& c, const V& d) {
  return each([&](int i) { return a.lane[i] * b.lane[i] - c.lane[i] * d.lane[i]; });
}
RESPIKE_INLINE V silu(const V& x) {
  return each([&](int i) { return x.lane[i] / (1.0f + std::exp(-x.lane[i])); });
}
template <class Kind>
RESPIKE_INLINE V weights(Kind kind, const std::uint8_t* row, int column) {
  return each([=](int i) { return weight_at(kind, row, column + i); });
}

}  // namespace portable

#if RESPIKE_X86

// exp(x) = 2^n exp(r) with |r| <= ln(2) / 2; a polynomial for exp(r), relative error 2e-7.
constexpr float log2_e = 1.44269504f;
constexpr float ln2_high = 0.693359375f;
constexpr float ln2_low = -2.12194440e-4f;
constexpr float exp_terms[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                               4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};

// ---- AVX2

namespace avx2 {

#define RESPIKE_OP RESPIKE_AVX2 RESPIKE_INLINE

constexpr int width = 8;
using V = __m256;

RESPIKE_OP V same(float value) { return _mm256_set1_ps(value); }
template <class T>
RESPIKE_OP V get(const T* p) {
  return load8(p);
}
RESPIKE_OP V get_half(const std::uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <class T>
RESPIKE_OP void put(T* p, V v) {
  store8(p, v);
}
template <class T>
RESPIKE_OP V rounded(const T* p, V v) {
  return round_as8(p, v);
}
RESPIKE_OP V add(V a, V b) { return _mm256_add_ps(a, b); }
RESPIKE_OP V mul(V a, V b) { return _mm256_mul_ps(a, b); }
RESPIKE_OP V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
RESPIKE_OP V cross(V a, V b, V c, V d) { return _mm256_fmsub_ps(a, b, _mm256_mul_ps(c, d)); }

RESPIKE_OP V silu(V x) {
  // The limits keep NaN: min and max return their second argument then.
  V y = _mm256_sub_ps(_mm256_setzero_ps(), x);
  y = _mm256_max_ps(same(-87.0f), _mm256_min_ps(same(88.0f), y));
  const V n = _mm256_round_ps(_mm256_mul_ps(y, same(log2_e)), _MM_FROUND_TO_NEAREST_INT | 8);
  const V r = _mm256_fnmadd_ps(n, same(ln2_low), _mm256_fnmadd_ps(n, same(ln2_high), y));
  V p = same(exp_terms[0]);
  for (int i = 1; i < 6; ++i) p = _mm256_fmadd_ps(p, r, same(exp_terms[i]));
  p = _mm256_add_ps(_mm256_fmadd_ps(_mm256_mul_ps(r, r), p, r), same(1.0f));
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  p = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
  return _mm256_div_ps(x, _mm256_add_ps(same(1.0f), p));
}

RESPIKE_OP V weights(WeightF32, const std::uint8_t* row, int column) {
  return load8(reinterpret_cast<const float*>(row) + column);
}
RESPIKE_OP V weights(WeightBF16, const std::uint8_t* row, int column) {
  return load8(reinterpret_cast<const bf16*>(row) + column);
}
RESPIKE_OP V weights(WeightInt8, const std::uint8_t* row, int column) {
  const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + column));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
}
RESPIKE_OP V weights(WeightInt4, const std::uint8_t* row, int column) {
  const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + column % 32));
  const __m256i wide = _mm256_cvtepi8_epi32(eight);
  const __m256i high = column < 32 ? _mm256_slli_epi32(wide, 28) : wide;
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(high, column < 32 ? 28 : 4));
}

#undef RESPIKE_OP

}  // namespace avx2

// ---- AVX-512

namespace avx512 {

#define RESPIKE_OP RESPIKE_AVX512 RESPIKE_INLINE

constexpr int width = 16;
using V = __m512;

RESPIKE_OP V same(float value) { return _mm512_set1_ps(value); }
template <class T>
RESPIKE_OP V get(const T* p) {
  return load16(p, 0xffff);
}
RESPIKE_OP V get_half(const std::uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <class T>
RESPIKE_OP void put(T* p, V v) {
  store16(p, 0xffff, v);
}
template <class T>
RESPIKE_OP V rounded(const T* p, V v) {
  return round_as16(p, v);
}
RESPIKE_OP V add(V a, V b) { return _mm512_add_ps(a, b); }
RESPIKE_OP V mul(V a, V b) { return _mm512_mul_ps(a, b); }
RESPIKE_OP V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
RESPIKE_OP V cross(V a, V b, V c, V d) { return _mm512_fmsub_ps(a, b, _mm512_mul_ps(c, d)); }

RESPIKE_OP V silu(V x) {
  V y = _mm512_sub_ps(_mm512_setzero_ps(), x);
  y = _mm512_max_ps(same(-87.0f), _mm512_min_ps(same(88.0f), y));
  const V n = _mm512_roundscale_ps(_mm512_mul_ps(y, same(log2_e)), 8);
  const V r = _mm512_fnmadd_ps(n, same(ln2_low), _mm512_fnmadd_ps(n, same(ln2_high), y));
  V p = same(exp_terms[0]);
  for (int i = 1; i < 6; ++i) p = _mm512_fmadd_ps(p, r, same(exp_terms[i]));
  p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(r, r), p, r), same(1.0f));
  return _mm512_div_ps(x, _mm512_add_ps(same(1.0f), _mm512_scalef_ps(p, n)));
}

RESPIKE_OP V weights(WeightF32, const std::uint8_t* row, int column) {
  return _mm512_loadu_ps(reinterpret_cast<const float*>(row) + column);
}
RESPIKE_OP V weights(WeightBF16, const std::uint8_t* row, int column) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 2 * column));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
RESPIKE_OP V weights(WeightInt8, const std::uint8_t* row, int column) {
  const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + column));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen));
}
RESPIKE_OP V weights(WeightInt4, const std::uint8_t* row, int column) {
  // The permutation looks at the low four bits of each lane: it is the table of all values.
  const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + column % 32));
  const __m512i wide = _mm512_cvtepu8_epi32(bytes);
  return _mm512_permutexvar_ps(column < 32 ? wide : _mm512_srli_epi32(wide, 4), table);
}

#undef RESPIKE_OP

}  // namespace avx512

#endif  // RESPIKE_X86

}  // namespace respike
