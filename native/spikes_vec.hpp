// Sums of 64 outputs over events, of every level under one set of names; for spikes.cpp.
//
// Two events at a time: add(kind, a, b, counts) adds a * low + b * high, with a and b the packed
// weight rows of two inputs and low, high the signed 16-bit halves of counts. All in int32, so
// exact: a group's 128 inputs of weights to -128 and counts to 32767 stay below 2^30. keep() puts
// the sums by, in an order of their own, until resume(). flush() adds to the float sums, in float32 and without fma: part = float(sum) * scale; sums += part.
#pragma once

#include "packed.hpp"
#include "spikes.hpp"
#include "vec.hpp"

namespace respike {

namespace portable {

struct EventSums {
  std::int32_t sum[tile_width] = {};

  template <class Kind>
  RESPIKE_INLINE void add(Kind kind, const std::uint8_t* a, const std::uint8_t* b,
                          std::int32_t counts) {
    const std::int32_t low = static_cast<std::int16_t>(counts & 0xffff), high = counts >> 16;
    for (int c = 0; c < tile_width; ++c) {
      sum[c] += integer_at(kind, a, c) * low + integer_at(kind, b, c) * high;
    }
  }

  RESPIKE_INLINE void resume(const std::int32_t* from) { std::memcpy(sum, from, sizeof sum); }
  RESPIKE_INLINE void keep(std::int32_t* to) const { std::memcpy(to, sum, sizeof sum); }
  RESPIKE_INLINE void flush(const std::uint16_t* scales, float* sums) const {
    for (int c = 0; c < tile_width; ++c) {
      sums[c] += static_cast<float>(sum[c]) * half_to_float(scales[c]);
    }
  }
};

}  // namespace portable

#if RESPIKE_X86

namespace avx2 {

#define RESPIKE_OP RESPIKE_AVX2 RESPIKE_INLINE

// Weights [16 q, 16 q + 16) of a row.
RESPIKE_OP __m256i sixteen(WeightInt8, const std::uint8_t* row, int q) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 16 * q)));
}
RESPIKE_OP __m256i sixteen(WeightInt4, const std::uint8_t* row, int q) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 16 * (q % 2)));
  const __m256i wide = _mm256_cvtepi8_epi16(bytes);
  return _mm256_srai_epi16(q < 2 ? _mm256_slli_epi16(wide, 12) : wide, q < 2 ? 12 : 4);
}

RESPIKE_OP V plus(V a, V b) { return add(a, b); }

// Interleaving leaves outputs 0-3, 8-11 of every 16 in the even vectors, 4-7, 12-15 in the odd.
struct EventSums {
  __m256i sum[8];

  RESPIKE_OP EventSums() {
    for (auto& s : sum) s = _mm256_setzero_si256();
  }

  template <class Kind>
  RESPIKE_OP void add(Kind kind, const std::uint8_t* a, const std::uint8_t* b,
                      std::int32_t counts) {
    const __m256i both = _mm256_set1_epi32(counts);
    for (int q = 0; q < 4; ++q) {
      const __m256i x = sixteen(kind, a, q), y = sixteen(kind, b, q);
      const __m256i even = _mm256_madd_epi16(_mm256_unpacklo_epi16(x, y), both);
      const __m256i odd = _mm256_madd_epi16(_mm256_unpackhi_epi16(x, y), both);
      sum[2 * q] = _mm256_add_epi32(sum[2 * q], even);
      sum[2 * q + 1] = _mm256_add_epi32(sum[2 * q + 1], odd);
    }
  }

  RESPIKE_OP void resume(const std::int32_t* from) {
    for (int i = 0; i < 8; ++i) {
      sum[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 8 * i));
    }
  }
  RESPIKE_OP void keep(std::int32_t* to) const {
    for (int i = 0; i < 8; ++i) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8 * i), sum[i]);
    }
  }
  RESPIKE_OP void flush(const std::uint16_t* scales, float* sums) const {
    for (int q = 0; q < 4; ++q) {
      for (int half = 0; half < 2; ++half) {
        const __m256i s = half ? _mm256_permute2x128_si256(sum[2 * q], sum[2 * q + 1], 0x31)
                               : _mm256_permute2x128_si256(sum[2 * q], sum[2 * q + 1], 0x20);
        const int at = 16 * q + 8 * half;
        put(sums + at, plus(get(sums + at), mul(_mm256_cvtepi32_ps(s), get_half(scales + at))));
      }
    }
  }
};

#undef RESPIKE_OP

}  // namespace avx2

namespace avx512 {

#define RESPIKE_OP RESPIKE_AVX512 RESPIKE_INLINE

// Weights [32 h, 32 h + 32) of a row.
RESPIKE_OP __m512i thirty_two(WeightInt8, const std::uint8_t* row, int h) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 32 * h)));
}
RESPIKE_OP __m512i thirty_two(WeightInt4, const std::uint8_t* row, int h) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
  const __m512i wide = _mm512_cvtepi8_epi16(bytes);
  return _mm512_srai_epi16(h == 0 ? _mm512_slli_epi16(wide, 12) : wide, h == 0 ? 12 : 4);
}

RESPIKE_OP V plus(V a, V b) { return add(a, b); }

// Interleaving leaves every other four outputs of each 32 in the even vector, the rest in the odd.
struct EventSums {
  __m512i sum[4];

  RESPIKE_OP EventSums() {
    for (auto& s : sum) s = _mm512_setzero_si512();
  }

  template <class Kind>
  RESPIKE_OP void add(Kind kind, const std::uint8_t* a, const std::uint8_t* b,
                      std::int32_t counts) {
    const __m512i both = _mm512_set1_epi32(counts);
    for (int h = 0; h < 2; ++h) {
      const __m512i x = thirty_two(kind, a, h), y = thirty_two(kind, b, h);
      const __m512i even = _mm512_madd_epi16(_mm512_unpacklo_epi16(x, y), both);
      const __m512i odd = _mm512_madd_epi16(_mm512_unpackhi_epi16(x, y), both);
      sum[2 * h] = _mm512_add_epi32(sum[2 * h], even);
      sum[2 * h + 1] = _mm512_add_epi32(sum[2 * h + 1], odd);
    }
  }

  RESPIKE_OP void resume(const std::int32_t* from) {
    for (int i = 0; i < 4; ++i) sum[i] = _mm512_loadu_si512(from + 16 * i);
  }
  RESPIKE_OP void keep(std::int32_t* to) const {
    for (int i = 0; i < 4; ++i) _mm512_storeu_si512(to + 16 * i, sum[i]);
  }
  RESPIKE_OP void flush(const std::uint16_t* scales, float* sums) const {
    const __m512i first =
        _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int h = 0; h < 2; ++h) {
      for (int half = 0; half < 2; ++half) {
        const __m512i order = half ? second : first;
        const __m512i s = _mm512_permutex2var_epi32(sum[2 * h], order, sum[2 * h + 1]);
        const int at = 32 * h + 16 * half;
        put(sums + at, plus(get(sums + at), mul(_mm512_cvtepi32_ps(s), get_half(scales + at))));
      }
    }
  }
};

#undef RESPIKE_OP

}  // namespace avx512

#endif  // RESPIKE_X86

}  // namespace respike
