// Float32 vectors of every level under one set of names, so that a kernel is written once.
//
// A kernel file is included once for each level, by each_level.hpp, in the level's namespace:
// V is its vector, width its number of lanes. weights() reads lanes [column, column + width) of a
// packed row, before scaling.
//
// Products of matrices are written over cells of 32 bits, of which V holds `width`: a cell is one
// float32 (Cell = float) or, at level avx512bf16, two bfloat16 (Cell = bf16) whose products dot()
// adds to the same lane, exact and in float32, subnormals taken as zero.
#pragma once

#include <bitset>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

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

constexpr float minus_infinity = -std::numeric_limits<float>::infinity();
inline int bits_of(int mask) {
  return static_cast<int>(std::bitset<16>(static_cast<unsigned>(mask)).count());
}
// Below this, exp gives 0 and not a subnormal number.
constexpr float smallest_exp = -87.0f;
constexpr float log2_e = 1.44269504f;

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
RESPIKE_INLINE V sub(const V& a, const V& b) {
  return each([&](int i) { return a.lane[i] - b.lane[i]; });
}
RESPIKE_INLINE V div(const V& a, const V& b) {
  return each([&](int i) { return a.lane[i] / b.lane[i]; });
}
// a * b in the lanes before `count`, a in the others; a in the lanes before `count`, else 0.
RESPIKE_INLINE V mul_before(int count, const V& a, const V& b) {
  return each([&](int i) { return i < count ? a.lane[i] * b.lane[i] : a.lane[i]; });
}
RESPIKE_INLINE V keep_before(int count, const V& a) {
  return each([&](int i) { return i < count ? a.lane[i] : 0.0f; });
}
// Lane j of row i and lane i of row j change places.
RESPIKE_INLINE void transpose(V (&rows)[width]) {
  for (int i = 0; i < width; ++i) {
    for (int j = 0; j < i; ++j) std::swap(rows[i].lane[j], rows[j].lane[i]);
  }
}
// 0 below smallest_exp.
RESPIKE_INLINE V exp(const V& x) {
  return each([&](int i) { return x.lane[i] < smallest_exp ? 0.0f : std::exp(x.lane[i]); });
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
RESPIKE_INLINE V larger(const V& a, const V& b) {
  return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
// 2^x for x below 127; of -inf exactly 0.
RESPIKE_INLINE V two_to(const V& x) {
  return each([&](int i) { return std::exp2(x.lane[i]); });
}
// Whether a lane of a is above the same of b; NaN is not.
RESPIKE_INLINE bool any_above(const V& a, const V& b) {
  for (int i = 0; i < width; ++i) {
    if (a.lane[i] > b.lane[i]) return true;
  }
  return false;
}
// In how many lanes a is above b; NaN is not.
RESPIKE_INLINE int count_above(const V& a, const V& b) {
  int count = 0;
  for (int i = 0; i < width; ++i) count += a.lane[i] > b.lane[i] ? 1 : 0;
  return count;
}
// Lanes of x above those of `least`, in their order, and what stands at their places in ids; how
// many. Of what is written behind them, up to `width` of each, nothing is said; both may be written
// to where they came from, or before.
RESPIKE_INLINE int keep_above(const V& x, const std::int32_t* ids, const V& least, float* to,
                              std::int32_t* to_ids) {
  int count = 0;
  for (int i = 0; i < width; ++i) {
    if (!(x.lane[i] > least.lane[i])) continue;
    to[count] = x.lane[i];
    to_ids[count++] = ids[i];
  }
  return count;
}
RESPIKE_INLINE float highest(const V& v) {
  float found = v.lane[0];
  for (int i = 1; i < width; ++i) found = v.lane[i] > found ? v.lane[i] : found;
  return found;
}
RESPIKE_INLINE float total(const V& v) {
  float sum = 0.0f;
  for (int i = 0; i < width; ++i) sum += v.lane[i];
  return sum;
}
// v in lanes [from, to), other elsewhere.
RESPIKE_INLINE V within(const V& v, const V& other, int from, int to) {
  return each([&](int i) { return i >= from && i < to ? v.lane[i] : other.lane[i]; });
}
// x in lanes where from <= v < to, 0 elsewhere.
RESPIKE_INLINE V keep_between(const V& x, const V& v, const V& from, const V& to) {
  return each([&](int i) {
    return from.lane[i] <= v.lane[i] && v.lane[i] < to.lane[i] ? x.lane[i] : 0.0f;
  });
}

using Cell = float;
template <class T>
RESPIKE_INLINE V cells(const T* p) {
  return get(p);
}
RESPIKE_INLINE V same_cell(const float* p) { return same(*p); }
RESPIKE_INLINE V dot(const V& sum, const V& a, const V& b) { return fma(a, b, sum); }
RESPIKE_INLINE void put_cells(float* p, const V& v) { put(p, v); }
// Two rows, column by column, as cells of a panel; without pairs there is but one row.
RESPIKE_INLINE void put_rows(float* panel, const V& row, const V&) { put(panel, row); }

// The level whose cells are float32 and which this one has the vectors of.
namespace exact = portable;

}  // namespace portable

#if RESPIKE_X86

// exp(x) = 2^n exp(r) with |r| <= ln(2) / 2; a polynomial for exp(r), relative error 2e-7.
constexpr float ln2_high = 0.693359375f;
constexpr float ln2_low = -2.12194440e-4f;
constexpr float exp_terms[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                               4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
// 2^r for r from 0 to 1, relative error 2e-7.
constexpr float two_to_terms[] = {1.877576695e-3f, 8.989339694e-3f, 5.582631752e-2f,
                                  2.401536107e-1f, 6.931530833e-1f, 9.999999404e-1f};

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

RESPIKE_OP V sub(V a, V b) { return _mm256_sub_ps(a, b); }
RESPIKE_OP V div(V a, V b) { return _mm256_div_ps(a, b); }
RESPIKE_OP V before(int count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane));
}
RESPIKE_OP V mul_before(int count, V a, V b) {
  return _mm256_blendv_ps(a, _mm256_mul_ps(a, b), before(count));
}
RESPIKE_OP V keep_before(int count, V a) { return _mm256_and_ps(a, before(count)); }
// The first step of a transposition: afterwards lanes 4b .. 4b + 3 of row 4g + c hold what was in
// lane 4b + c of rows 4g .. 4g + 3.
RESPIKE_OP void transpose_fours(V* rows) {
  for (V* r = rows; r != rows + width; r += 4) {
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(r[0], r[1]));
    const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(r[0], r[1]));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(r[2], r[3]));
    const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(r[2], r[3]));
    r[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    r[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    r[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    r[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
  }
}
RESPIKE_OP void transpose(V (&rows)[width]) {
  transpose_fours(rows);
  for (int c = 0; c < 4; ++c) {
    const V low = rows[c], high = rows[4 + c];
    rows[c] = _mm256_permute2f128_ps(low, high, 0x20);
    rows[4 + c] = _mm256_permute2f128_ps(low, high, 0x31);
  }
}

// exp of what lies within [smallest_exp, 88]; other values are taken as the nearest that does.
// The limits keep NaN: min and max return their second argument then.
RESPIKE_OP V exp_within(V y) {
  y = _mm256_max_ps(same(smallest_exp), _mm256_min_ps(same(88.0f), y));
  const V n = _mm256_round_ps(_mm256_mul_ps(y, same(log2_e)), _MM_FROUND_TO_NEAREST_INT | 8);
  const V r = _mm256_fnmadd_ps(n, same(ln2_low), _mm256_fnmadd_ps(n, same(ln2_high), y));
  V p = same(exp_terms[0]);
  for (int i = 1; i < 6; ++i) p = _mm256_fmadd_ps(p, r, same(exp_terms[i]));
  p = _mm256_add_ps(_mm256_fmadd_ps(_mm256_mul_ps(r, r), p, r), same(1.0f));
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
}
RESPIKE_OP V exp(V x) {
  const V small = _mm256_cmp_ps(x, same(smallest_exp), _CMP_LT_OQ);
  return _mm256_andnot_ps(small, exp_within(x));
}
RESPIKE_OP V silu(V x) {
  const V p = exp_within(_mm256_sub_ps(_mm256_setzero_ps(), x));
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

RESPIKE_OP V get(const std::int8_t* p) {
  const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
}
RESPIKE_OP V larger(V a, V b) { return _mm256_max_ps(a, b); }
RESPIKE_OP V two_to(V x) {
  const V limited = _mm256_max_ps(same(-126.0f), x);  // keeps NaN, as in silu
  const V n = _mm256_floor_ps(limited);
  const V r = _mm256_sub_ps(limited, n);
  V p = same(two_to_terms[0]);
  for (int i = 1; i < 6; ++i) p = _mm256_fmadd_ps(p, r, same(two_to_terms[i]));
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  p = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
  return _mm256_andnot_ps(_mm256_cmp_ps(x, same(-126.0f), _CMP_LT_OQ), p);
}
RESPIKE_OP bool any_above(V a, V b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
}
RESPIKE_OP int count_above(V a, V b) {
  return bits_of(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
}
RESPIKE_OP int keep_above(V x, const std::int32_t* ids, V least, float* to, std::int32_t* to_ids) {
  const int above = _mm256_movemask_ps(_mm256_cmp_ps(x, least, _CMP_GT_OQ));
  if (above == 0) return 0;
  float lanes[width];
  store8(lanes, x);
  int count = 0;
  for (int i = 0; i < width; ++i) {
    if ((above >> i & 1) == 0) continue;
    to[count] = lanes[i];
    to_ids[count++] = ids[i];
  }
  return count;
}
RESPIKE_OP float highest(V v) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
RESPIKE_OP float total(V v) { return sum8(v); }
RESPIKE_OP V within(V v, V other, int from, int to) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i before = _mm256_cmpgt_epi32(_mm256_set1_epi32(from), lane);
  const __m256i inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(to), lane);
  return _mm256_blendv_ps(other, v, _mm256_castsi256_ps(_mm256_andnot_si256(before, inside)));
}
RESPIKE_OP V keep_between(V x, V v, V from, V to) {
  const V inside =
      _mm256_and_ps(_mm256_cmp_ps(from, v, _CMP_LE_OQ), _mm256_cmp_ps(v, to, _CMP_LT_OQ));
  return _mm256_and_ps(inside, x);
}

using Cell = float;
template <class T>
RESPIKE_OP V cells(const T* p) {
  return get(p);
}
RESPIKE_OP V same_cell(const float* p) { return same(*p); }
RESPIKE_OP V dot(V sum, V a, V b) { return fma(a, b, sum); }
RESPIKE_OP void put_cells(float* p, V v) { put(p, v); }
RESPIKE_OP void put_rows(float* panel, V row, V) { put(panel, row); }

#undef RESPIKE_OP

namespace exact = avx2;

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

RESPIKE_OP V sub(V a, V b) { return _mm512_sub_ps(a, b); }
RESPIKE_OP V div(V a, V b) { return _mm512_div_ps(a, b); }
RESPIKE_OP __mmask16 before(int count) {
  return static_cast<__mmask16>((1u << static_cast<unsigned>(count)) - 1);
}
RESPIKE_OP V mul_before(int count, V a, V b) { return _mm512_mask_mul_ps(a, before(count), a, b); }
RESPIKE_OP V keep_before(int count, V a) { return _mm512_maskz_mov_ps(before(count), a); }
RESPIKE_OP void transpose(V (&rows)[width]) {
  for (V* r = rows; r != rows + width; r += 4) {  // fours of lanes, as AVX2's transpose_fours
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(r[0], r[1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(r[0], r[1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(r[2], r[3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(r[2], r[3]));
    r[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  for (int c = 0; c < 4; ++c) {  // and a matrix of 4 x 4 such fours
    const V even = _mm512_shuffle_f32x4(rows[c], rows[4 + c], 0x44);
    const V odd = _mm512_shuffle_f32x4(rows[c], rows[4 + c], 0xee);
    const V even2 = _mm512_shuffle_f32x4(rows[8 + c], rows[12 + c], 0x44);
    const V odd2 = _mm512_shuffle_f32x4(rows[8 + c], rows[12 + c], 0xee);
    rows[c] = _mm512_shuffle_f32x4(even, even2, 0x88);
    rows[4 + c] = _mm512_shuffle_f32x4(even, even2, 0xdd);
    rows[8 + c] = _mm512_shuffle_f32x4(odd, odd2, 0x88);
    rows[12 + c] = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
  }
}

RESPIKE_OP V exp_within(V y) {
  y = _mm512_max_ps(same(smallest_exp), _mm512_min_ps(same(88.0f), y));
  const V n = _mm512_roundscale_ps(_mm512_mul_ps(y, same(log2_e)), 8);
  const V r = _mm512_fnmadd_ps(n, same(ln2_low), _mm512_fnmadd_ps(n, same(ln2_high), y));
  V p = same(exp_terms[0]);
  for (int i = 1; i < 6; ++i) p = _mm512_fmadd_ps(p, r, same(exp_terms[i]));
  p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(r, r), p, r), same(1.0f));
  return _mm512_scalef_ps(p, n);
}
RESPIKE_OP V exp(V x) {
  const __mmask16 small = _mm512_cmp_ps_mask(x, same(smallest_exp), _CMP_LT_OQ);
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(~small), exp_within(x));
}
RESPIKE_OP V silu(V x) {
  const V p = exp_within(_mm512_sub_ps(_mm512_setzero_ps(), x));
  return _mm512_div_ps(x, _mm512_add_ps(same(1.0f), p));
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

RESPIKE_OP V get(const std::int8_t* p) {
  const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen));
}
RESPIKE_OP V larger(V a, V b) { return _mm512_max_ps(a, b); }
RESPIKE_OP V two_to(V x) {
  const V r = _mm512_reduce_ps(x, 1);  // x - floor(x); of infinities 0
  V p = same(two_to_terms[0]);
  for (int i = 1; i < 6; ++i) p = _mm512_fmadd_ps(p, r, same(two_to_terms[i]));
  return _mm512_scalef_ps(p, x);  // p * 2^floor(x)
}
RESPIKE_OP bool any_above(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
RESPIKE_OP int count_above(V a, V b) {
  return bits_of(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ));
}
RESPIKE_OP int keep_above(V x, const std::int32_t* ids, V least, float* to, std::int32_t* to_ids) {
  const __mmask16 above = _mm512_cmp_ps_mask(x, least, _CMP_GT_OQ);
  // Not stores of what is compressed: those are slow on some processors.
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(above, x));
  _mm512_storeu_si512(to_ids, _mm512_maskz_compress_epi32(above, _mm512_loadu_si512(ids)));
  return bits_of(above);
}
RESPIKE_OP float highest(V v) { return _mm512_reduce_max_ps(v); }
RESPIKE_OP float total(V v) { return _mm512_reduce_add_ps(v); }
RESPIKE_OP V within(V v, V other, int from, int to) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 after = _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(from));
  return _mm512_mask_mov_ps(
      other, _mm512_mask_cmplt_epi32_mask(after, lane, _mm512_set1_epi32(to)), v);
}
RESPIKE_OP V keep_between(V x, V v, V from, V to) {
  const __mmask16 after = _mm512_cmp_ps_mask(from, v, _CMP_LE_OQ);
  return _mm512_maskz_mov_ps(_mm512_mask_cmp_ps_mask(after, v, to, _CMP_LT_OQ), x);
}

using Cell = float;
template <class T>
RESPIKE_OP V cells(const T* p) {
  return get(p);
}
RESPIKE_OP V same_cell(const float* p) { return same(*p); }
RESPIKE_OP V dot(V sum, V a, V b) { return fma(a, b, sum); }
RESPIKE_OP void put_cells(float* p, V v) { put(p, v); }
RESPIKE_OP void put_rows(float* panel, V row, V) { put(panel, row); }

#undef RESPIKE_OP

namespace exact = avx512;

}  // namespace avx512

// ---- AVX512-BF16: float32 vectors as for AVX-512, cells of two bfloat16

namespace avx512bf16 {

#define RESPIKE_OP RESPIKE_AVX512BF16 RESPIKE_INLINE

using namespace avx512;
using Cell = bf16;

RESPIKE_OP V cells(const bf16* p) { return _mm512_loadu_ps(p); }
RESPIKE_OP V cells(const std::int8_t* p) {
  return (V)_mm512_cvtne2ps_pbh(get(p + width), get(p));
}
RESPIKE_OP V same_cell(const bf16* p) {
  int bits;
  std::memcpy(&bits, p, sizeof bits);
  return _mm512_castsi512_ps(_mm512_set1_epi32(bits));
}
RESPIKE_OP V dot(V sum, V a, V b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
RESPIKE_OP void put_cells(bf16* p, V v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
}
RESPIKE_OP void put_rows(float* panel, V first, V second) {
  const __m512i a = _mm512_castps_si512(first), b = _mm512_castps_si512(second);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i low = _mm512_add_epi32(  // words i and 32 + i of both
      _mm512_or_si512(lane, _mm512_slli_epi32(lane, 16)), _mm512_set1_epi32(32 << 16));
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  _mm512_storeu_si512(panel, _mm512_permutex2var_epi16(a, low, b));
  _mm512_storeu_si512(panel + width, _mm512_permutex2var_epi16(a, high, b));
}

#undef RESPIKE_OP

namespace exact = avx512;

}  // namespace avx512bf16

#endif  // RESPIKE_X86

}  // namespace respike
