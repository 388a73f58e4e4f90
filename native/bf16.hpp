// bfloat16 in memory, float32 in registers: scalar, 8-wide and 16-wide loads and stores.
//
// Every function exists for float and for bf16 under one name, so that a kernel is written once
// as a template. round_as rounds float32 values to what the element type can hold, to nearest,
// ties to even, as PyTorch does.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu.hpp"

namespace respike {

struct bf16 {
  std::uint16_t bits;
};

inline float load(const float* p) { return *p; }
inline float load(const bf16* p) {
  const std::uint32_t bits = static_cast<std::uint32_t>(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float load(const std::int8_t* p) { return *p; }

inline void store(float* p, float value) { *p = value; }
inline void store(bf16* p, float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const bool nan = value != value;
  p->bits = nan ? 0x7fc0 : static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class T>
float round_as(float value) {
  T rounded;
  store(&rounded, value);
  return load(&rounded);
}

#if RESPIKE_X86

// ---- 8 wide

RESPIKE_AVX2 inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
RESPIKE_AVX2 inline __m256 load8(const bf16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// The rounded bfloat16 bits of 8 floats, each in the low half of a 32-bit lane.
RESPIKE_AVX2 inline __m256i bf16_bits8(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
}

RESPIKE_AVX2 inline void store8(float* p, __m256 value) { _mm256_storeu_ps(p, value); }
RESPIKE_AVX2 inline void store8(bf16* p, __m256 value) {
  const __m256i bits = bf16_bits8(value);
  const __m128i low = _mm256_castsi256_si128(bits);
  const __m128i high = _mm256_extracti128_si256(bits, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
}

RESPIKE_AVX2 inline __m256 round_as8(const float*, __m256 value) { return value; }
RESPIKE_AVX2 inline __m256 round_as8(const bf16*, __m256 value) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(bf16_bits8(value), 16));
}

RESPIKE_AVX2 inline float sum8(__m256 value) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// ---- 16 wide; lanes outside the mask load as zero and are not stored

RESPIKE_AVX512 inline __m512 load16(const float* p, __mmask16 lanes) {
  return _mm512_maskz_loadu_ps(lanes, p);
}
RESPIKE_AVX512 inline __m512 load16(const bf16* p, __mmask16 lanes) {
  const __m256i half = _mm256_maskz_loadu_epi16(lanes, p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

RESPIKE_AVX512 inline __m512i bf16_bits16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
}

RESPIKE_AVX512 inline void store16(float* p, __mmask16 lanes, __m512 value) {
  _mm512_mask_storeu_ps(p, lanes, value);
}
RESPIKE_AVX512 inline void store16(bf16* p, __mmask16 lanes, __m512 value) {
  _mm256_mask_storeu_epi16(p, lanes, _mm512_cvtepi32_epi16(bf16_bits16(value)));
}

RESPIKE_AVX512 inline __m512 round_as16(const float*, __m512 value) { return value; }
RESPIKE_AVX512 inline __m512 round_as16(const bf16*, __m512 value) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(bf16_bits16(value), 16));
}

#endif  // RESPIKE_X86

}  // namespace respike
