// Dot products of int8 with packed integer weights, four inputs at once, under one set of names.
//
// A 32-bit lane of Q holds the weights of four inputs to one output; columns are in order. Some
// instructions want unsigned weights: offset(kind) is what Q has added to each, for the caller to
// take off again. Every sum is exact: 128 products of at most 255 * 127 fit int32, and the 16-bit
// sums of maddubs hold 2 * 15 * 127.
#pragma once

#include "vec.hpp"

namespace respike {

// ---- portable

namespace portable {

constexpr int strip = 2;     // vectors that quads() makes
constexpr int most_rows = 2;  // rows of x that share weights in registers

struct Q {
  std::int8_t byte[4 * width];
};
struct I {
  std::int32_t lane[width];
};

template <class Kind>
constexpr int offset(Kind) {
  return 0;
}

// The weights of four packed rows, columns [column, column + strip * width).
template <class Kind>
RESPIKE_INLINE void quads(Kind kind, const std::uint8_t* rows, int column, Q* out) {
  for (int i = 0; i < 4 * width * strip; ++i) {
    const std::uint8_t* row = rows + i % 4 * Kind::row_bytes;
    const float weight = weight_at(kind, row, column + i / 4);
    out[i / (4 * width)].byte[i % (4 * width)] = static_cast<std::int8_t>(weight);
  }
}
RESPIKE_INLINE Q get_quads(const void* p) {
  Q q;
  std::memcpy(&q, p, sizeof q);
  return q;
}
RESPIKE_INLINE void put_quads(void* p, const Q& q) { std::memcpy(p, &q, sizeof q); }
RESPIKE_INLINE Q same_quad(const std::int8_t* x) {
  Q q;
  for (int i = 0; i < 4 * width; ++i) q.byte[i] = x[i % 4];
  return q;
}
template <class Kind>
RESPIKE_INLINE I dot(Kind, I sum, const Q& w, const Q& x) {
  for (int i = 0; i < 4 * width; ++i) sum.lane[i / 4] += w.byte[i] * x.byte[i];
  return sum;
}

RESPIKE_INLINE I same_integer(std::int32_t value) {
  I v;
  for (std::int32_t& lane : v.lane) lane = value;
  return v;
}
RESPIKE_INLINE I plus(I a, const I& b) {
  for (int i = 0; i < width; ++i) a.lane[i] += b.lane[i];
  return a;
}
RESPIKE_INLINE I larger(I a, const I& b) {
  for (int i = 0; i < width; ++i) a.lane[i] = a.lane[i] < b.lane[i] ? b.lane[i] : a.lane[i];
  return a;
}
RESPIKE_INLINE std::int32_t sum_of(const I& v) {
  std::int32_t sum = 0;
  for (const std::int32_t lane : v.lane) sum += lane;
  return sum;
}
RESPIKE_INLINE std::int32_t largest_of(const I& v) {
  std::int32_t most = v.lane[0];
  for (const std::int32_t lane : v.lane) most = most < lane ? lane : most;
  return most;
}
// Bits of absolute values, which are in the order of the values; NaN is above infinity.
RESPIKE_INLINE I magnitude(const V& v) {
  I bits;
  std::memcpy(&bits, &v, sizeof bits);
  for (std::int32_t& lane : bits.lane) lane &= 0x7fffffff;
  return bits;
}
RESPIKE_INLINE V to_float(const I& v) {
  return each([&v](int i) { return static_cast<float>(v.lane[i]); });
}
// To nearest, ties to even.
RESPIKE_INLINE I nearest(const V& v) {
  I rounded;
  for (int i = 0; i < width; ++i) {
    rounded.lane[i] = static_cast<std::int32_t>(std::nearbyint(v.lane[i]));
  }
  return rounded;
}
// Values -128 to 127 as bytes.
RESPIKE_INLINE void put_bytes(std::int8_t* p, const I& v) {
  for (int i = 0; i < width; ++i) p[i] = static_cast<std::int8_t>(v.lane[i]);
}

}  // namespace portable

#if RESPIKE_X86

// ---- AVX2

namespace avx2 {

#define RESPIKE_OP RESPIKE_AVX2 RESPIKE_INLINE

constexpr int strip = 2;
constexpr int most_rows = 3;
using Q = __m256i;
using I = __m256i;

constexpr int offset(WeightInt8) { return 0; }
constexpr int offset(WeightInt4) { return 8; }

// Bytes of 16 columns, row after row `stride` apart, interleaved to quads.
RESPIKE_OP void interleave(const std::uint8_t* rows, std::int64_t stride, Q* out) {
  __m128i row[4];
  for (int i = 0; i < 4; ++i) {
    row[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + i * stride));
  }
  const __m128i low01 = _mm_unpacklo_epi8(row[0], row[1]);
  const __m128i low23 = _mm_unpacklo_epi8(row[2], row[3]);
  const __m128i high01 = _mm_unpackhi_epi8(row[0], row[1]);
  const __m128i high23 = _mm_unpackhi_epi8(row[2], row[3]);
  out[0] = _mm256_set_m128i(_mm_unpackhi_epi16(low01, low23), _mm_unpacklo_epi16(low01, low23));
  out[1] =
      _mm256_set_m128i(_mm_unpackhi_epi16(high01, high23), _mm_unpacklo_epi16(high01, high23));
}
RESPIKE_OP void quads(WeightInt8, const std::uint8_t* rows, int column, Q* out) {
  interleave(rows + column, WeightInt8::row_bytes, out);
}
RESPIKE_OP void quads(WeightInt4, const std::uint8_t* rows, int column, Q* out) {
  interleave(rows + column % 32, WeightInt4::row_bytes, out);
  for (int j = 0; j < strip; ++j) {
    const __m256i low = column < 32 ? out[j] : _mm256_srli_epi16(out[j], 4);
    const __m256i nibble = _mm256_and_si256(low, _mm256_set1_epi8(15));
    out[j] = _mm256_xor_si256(nibble, _mm256_set1_epi8(8));
  }
}
RESPIKE_OP Q get_quads(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
RESPIKE_OP void put_quads(void* p, Q q) { _mm256_storeu_si256(static_cast<__m256i*>(p), q); }
RESPIKE_OP Q same_quad(const std::int8_t* x) {
  int bits;
  std::memcpy(&bits, x, sizeof bits);
  return _mm256_set1_epi32(bits);
}
RESPIKE_OP __m256i even_bytes(__m256i v) {
  return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8);
}
RESPIKE_OP I dot(WeightInt8, I sum, Q w, Q x) {
  const __m256i even = _mm256_madd_epi16(even_bytes(w), even_bytes(x));
  const __m256i odd = _mm256_madd_epi16(_mm256_srai_epi16(w, 8), _mm256_srai_epi16(x, 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}
RESPIKE_OP I dot(WeightInt4, I sum, Q w, Q x) {
  const __m256i pairs = _mm256_maddubs_epi16(w, x);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

RESPIKE_OP I same_integer(std::int32_t value) { return _mm256_set1_epi32(value); }
RESPIKE_OP I plus(I a, I b) { return _mm256_add_epi32(a, b); }
RESPIKE_OP I larger(I a, I b) { return _mm256_max_epi32(a, b); }
RESPIKE_OP std::int32_t sum_of(I v) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
RESPIKE_OP std::int32_t largest_of(I v) {
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
RESPIKE_OP I magnitude(V v) {
  return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
}
RESPIKE_OP V to_float(I v) { return _mm256_cvtepi32_ps(v); }
RESPIKE_OP I nearest(V v) { return _mm256_cvtps_epi32(v); }
RESPIKE_OP void put_bytes(std::int8_t* p, I v) {
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

#undef RESPIKE_OP

}  // namespace avx2

// ---- AVX-512

namespace avx512 {

#define RESPIKE_OP RESPIKE_AVX512 RESPIKE_INLINE

constexpr int strip = 4;
constexpr int most_rows = 4;
using Q = __m512i;
// Not __m512i, whose lanes GCC takes for 64-bit: arrays of sums would then stay in memory.
using I = std::int32_t __attribute__((vector_size(64)));

constexpr int offset(WeightInt8) { return 0; }
constexpr int offset(WeightInt4) { return 8; }

RESPIKE_OP void quads(WeightInt8, const std::uint8_t* rows, int, Q* out) {
  // Interleaving stays within 128 bits: columns 0-3, 4-7, 8-11, 12-15 go to one such lane each.
  const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i row[4];
  for (int i = 0; i < 4; ++i) {
    row[i] = _mm512_permutexvar_epi32(lanes, _mm512_loadu_si512(rows + 64 * i));
  }
  const __m512i low01 = _mm512_unpacklo_epi8(row[0], row[1]);
  const __m512i low23 = _mm512_unpacklo_epi8(row[2], row[3]);
  const __m512i high01 = _mm512_unpackhi_epi8(row[0], row[1]);
  const __m512i high23 = _mm512_unpackhi_epi8(row[2], row[3]);
  out[0] = _mm512_unpacklo_epi16(low01, low23);
  out[1] = _mm512_unpackhi_epi16(low01, low23);
  out[2] = _mm512_unpacklo_epi16(high01, high23);
  out[3] = _mm512_unpackhi_epi16(high01, high23);
}
RESPIKE_OP void quads(WeightInt4, const std::uint8_t* rows, int, Q* out) {
  // Two packed rows a load. After the first step the lower half is rows 0 and 1, the upper 2 and 3.
  const __m512i first = _mm512_setr_epi64(0, 2, 1, 3, 8, 10, 9, 11);
  const __m512i second = _mm512_setr_epi64(4, 6, 5, 7, 12, 14, 13, 15);
  const __m512i words = _mm512_setr_epi32(
      0x00100000, 0x00110001, 0x00120002, 0x00130003, 0x00140004, 0x00150005, 0x00160006,
      0x00170007, 0x00180008, 0x00190009, 0x001a000a, 0x001b000b, 0x001c000c, 0x001d000d,
      0x001e000e, 0x001f000f);
  const __m512i a = _mm512_loadu_si512(rows), b = _mm512_loadu_si512(rows + 64);
  const __m512i even = _mm512_permutex2var_epi64(a, first, b);
  const __m512i odd = _mm512_permutex2var_epi64(a, second, b);
  const __m512i low = _mm512_permutexvar_epi16(words, _mm512_unpacklo_epi8(even, odd));
  const __m512i high = _mm512_permutexvar_epi16(words, _mm512_unpackhi_epi8(even, odd));
  const __m512i fifteen = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
  constexpr int and_xor = 0x6a;
  out[0] = _mm512_ternarylogic_epi32(low, fifteen, eight, and_xor);
  out[1] = _mm512_ternarylogic_epi32(high, fifteen, eight, and_xor);
  out[2] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(low, 4), fifteen, eight, and_xor);
  out[3] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(high, 4), fifteen, eight, and_xor);
}
RESPIKE_OP Q get_quads(const void* p) { return _mm512_loadu_si512(p); }
RESPIKE_OP void put_quads(void* p, Q q) { _mm512_storeu_si512(p, q); }
RESPIKE_OP Q same_quad(const std::int8_t* x) {
  int bits;
  std::memcpy(&bits, x, sizeof bits);
  return _mm512_set1_epi32(bits);
}
RESPIKE_OP __m512i even_bytes(__m512i v) {
  return _mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8);
}
RESPIKE_OP I dot(WeightInt8, I sum, Q w, Q x) {
  const __m512i even = _mm512_madd_epi16(even_bytes(w), even_bytes(x));
  const __m512i odd = _mm512_madd_epi16(_mm512_srai_epi16(w, 8), _mm512_srai_epi16(x, 8));
  return sum + (I)_mm512_add_epi32(even, odd);
}
RESPIKE_OP I dot(WeightInt4, I sum, Q w, Q x) {
  const __m512i pairs = _mm512_maddubs_epi16(w, x);
  return sum + (I)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}

RESPIKE_OP I same_integer(std::int32_t value) { return (I)_mm512_set1_epi32(value); }
RESPIKE_OP I plus(I a, I b) { return a + b; }
RESPIKE_OP I larger(I a, I b) { return (I)_mm512_max_epi32((__m512i)a, (__m512i)b); }
RESPIKE_OP std::int32_t sum_of(I v) { return _mm512_reduce_add_epi32((__m512i)v); }
RESPIKE_OP std::int32_t largest_of(I v) { return _mm512_reduce_max_epi32((__m512i)v); }
RESPIKE_OP I magnitude(V v) {
  return (I)_mm512_castps_si512(v) & 0x7fffffff;
}
RESPIKE_OP V to_float(I v) { return _mm512_cvtepi32_ps((__m512i)v); }
RESPIKE_OP I nearest(V v) { return (I)_mm512_cvtps_epi32(v); }
RESPIKE_OP void put_bytes(std::int8_t* p, I v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8((__m512i)v));
}

#undef RESPIKE_OP

}  // namespace avx512

// ---- AVX-512 with VNNI, which every processor with AVX512-BF16 has

namespace avx512bf16 {

using namespace avx512;

#define RESPIKE_OP RESPIKE_AVX512BF16 RESPIKE_INLINE

constexpr int most_rows = 6;

constexpr int offset(WeightInt8) { return 128; }
constexpr int offset(WeightInt4) { return 8; }

RESPIKE_OP void quads(WeightInt8 kind, const std::uint8_t* rows, int column, Q* out) {
  avx512::quads(kind, rows, column, out);
  for (int j = 0; j < strip; ++j) {
    out[j] = _mm512_xor_si512(out[j], _mm512_set1_epi8(-128));
  }
}
RESPIKE_OP void quads(WeightInt4 kind, const std::uint8_t* rows, int column, Q* out) {
  avx512::quads(kind, rows, column, out);
}
template <class Kind>
RESPIKE_OP I dot(Kind, I sum, Q w, Q x) {
  return (I)_mm512_dpbusd_epi32((__m512i)sum, w, x);
}

#undef RESPIKE_OP

}  // namespace avx512bf16

#endif  // RESPIKE_X86

}  // namespace respike
