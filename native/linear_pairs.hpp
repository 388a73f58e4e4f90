// Packed linear layers for many rows of bfloat16, with the dot products of AVX512-BF16: two inputs
// at once, products exact, sums in float32, subnormals taken as zero. Included by
// linear_exact.cpp only.
#pragma once

#include "amx.hpp"
#include "vec.hpp"

#if RESPIKE_X86

namespace respike::avx512 {
namespace {

constexpr int64_t panel_pairs = panel_depth / 2;

// Inputs [from, to) of a tile, two by two: each 32-bit lane has the weights of two inputs, unscaled
// and exact in bfloat16. An odd last one is paired with zero.
template <class Kind>
RESPIKE_AVX512BF16 void fill_pairs(const Tile& tile, int64_t from, int64_t to, float* panel) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int64_t i = from; i < to; i += 2) {
    const std::uint8_t* row = tile.rows + i * Kind::row_bytes;
    for (int j = 0; j < vectors; ++j, panel += width) {
      const __m512i a = _mm512_castps_si512(weights(Kind{}, row, j * width));
      __m512i b = _mm512_setzero_si512();
      if (i + 1 < to) b = _mm512_castps_si512(weights(Kind{}, row + Kind::row_bytes, j * width));
      const __m512i pair = _mm512_or_si512(_mm512_srli_epi32(a, 16), _mm512_and_si512(b, upper));
      _mm512_storeu_si512(panel, pair);
    }
  }
}

RESPIKE_AVX512BF16 RESPIKE_INLINE __m512bh same_pair(const bf16* x) {
  int bits;
  std::memcpy(&bits, x, sizeof bits);
  return (__m512bh)_mm512_set1_epi32(bits);
}

// sums (ROWS, 64) = or += x (ROWS, 2 * pairs) @ panel (2 * pairs, 64), each `group` pairs of it
// times their scales; without scales the group is the whole.
template <class Kind, int ROWS>
RESPIKE_AVX512BF16 void multiply_pairs(const float* panel, int64_t pairs, int64_t group,
                                       const std::uint16_t* scales, const bf16* x, int64_t stride,
                                       bool first, float* sums) {
  for (int64_t from = 0; from < pairs; from += group) {
    const int64_t to = std::min(from + group, pairs);
    V part[ROWS][vectors];
    for (int m = 0; m < ROWS; ++m) {
      for (int j = 0; j < vectors; ++j) part[m][j] = same(0.0f);
    }
    for (int64_t i = from; i < to; ++i) {
      __m512bh weight[vectors];
      for (int j = 0; j < vectors; ++j) {
        weight[j] = (__m512bh)_mm512_loadu_si512(panel + i * tile_width + j * width);
      }
      for (int m = 0; m < ROWS; ++m) {
        const __m512bh value = same_pair(x + m * stride + 2 * i);
        for (int j = 0; j < vectors; ++j) {
          part[m][j] = _mm512_dpbf16_ps(part[m][j], weight[j], value);
        }
      }
    }
    for (int j = 0; j < vectors; ++j) {
      const V scale = Kind::scaled ? get_half(scales + j * width) : same(1.0f);
      for (int m = 0; m < ROWS; ++m) {
        float* sum = sums + m * tile_width + j * width;
        put(sum, first ? mul(part[m][j], scale) : fma(part[m][j], scale, get(sum)));
      }
    }
    if (Kind::scaled) scales += tile_width;
    first = false;
  }
}

template <class Kind>
RESPIKE_AVX512BF16 void multiply_all_pairs(const float* panel, int64_t pairs, int64_t group,
                                           const std::uint16_t* scales,
                                           const Rows<bf16>& rows, int64_t from, float* sums) {
  const bool first = from == 0;
  const int64_t stride = rows.stride;
  const bf16* x = rows.x + from;
  int64_t m = 0;
  for (; m + 6 <= rows.count; m += 6, x += 6 * stride, sums += 6 * tile_width) {
    multiply_pairs<Kind, 6>(panel, pairs, group, scales, x, stride, first, sums);
  }
  switch (rows.count - m) {
    case 1: return multiply_pairs<Kind, 1>(panel, pairs, group, scales, x, stride, first, sums);
    case 2: return multiply_pairs<Kind, 2>(panel, pairs, group, scales, x, stride, first, sums);
    case 3: return multiply_pairs<Kind, 3>(panel, pairs, group, scales, x, stride, first, sums);
    case 4: return multiply_pairs<Kind, 4>(panel, pairs, group, scales, x, stride, first, sums);
    case 5: return multiply_pairs<Kind, 5>(panel, pairs, group, scales, x, stride, first, sums);
    default: return;
  }
}

// As multiply_all_pairs, by tiles.
template <class Kind, class Tiles>
RESPIKE_AMX void multiply_all_tiles(Tiles& tiles, const float* panel, int64_t pairs, int64_t group,
                                    const std::uint16_t* scales, const Rows<bf16>& rows,
                                    int64_t from, float* sums) {
  alignas(amx_bytes) float product[amx_rows * tile_width];
  for (int64_t row = 0; row < rows.count; row += amx_rows) {
    const int64_t left = rows.count - row;
    for (int64_t at = 0; at < pairs; at += group) {
      multiply_tiles(tiles, rows.x + row * rows.stride + from + 2 * at, 2 * rows.stride, left,
                     4 * std::min(group, pairs - at), panel + at * tile_width, product);
      const bool first = from + at == 0;
      for (int j = 0; j < tile_width; j += width) {
        const V scale =
            Kind::scaled ? get_half(scales + at / group * tile_width + j) : same(1.0f);
        for (int64_t m = 0; m < std::min(left, amx_rows); ++m) {
          float* sum = sums + (row + m) * tile_width + j;
          const V part = get(product + m * tile_width + j);
          put(sum, first ? mul(part, scale) : fma(part, scale, get(sum)));
        }
      }
    }
  }
}

// As many_rows of linear_kernels.inc.
template <class Kind, class Tiles = NoTiles>
RESPIKE_AVX512BF16 void many_pairs(const Tile& tile, const Rows<bf16>& rows, float* sums,
                                   float* panel) {
  [[maybe_unused]] Tiles tiles(amx_bytes);
  const int64_t group = Kind::scaled ? tile.group / 2 : panel_pairs;
  for (int64_t from = 0; from < tile.inputs; from += panel_depth) {
    const int64_t to = std::min(from + panel_depth, tile.inputs);
    fill_pairs<Kind>(tile, from, to, panel);
    prefetch<Kind>(tile, to, panel_depth);
    const std::uint16_t* scales =
        Kind::scaled ? tile.scales + from / tile.group * tile_width : nullptr;
    const int64_t pairs = (to - from + 1) / 2;
    if constexpr (std::is_same_v<Tiles, NoTiles>) {
      multiply_all_pairs<Kind>(panel, pairs, group, scales, rows, from, sums);
    } else {
      const int64_t whole = (pairs + 15) / 16 * 16;  // what tiles read
      std::fill(panel + pairs * tile_width, panel + whole * tile_width, 0.0f);
      multiply_all_tiles<Kind>(tiles, panel, pairs, group, scales, rows, from, sums);
    }
  }
}

}  // namespace
}  // namespace respike::avx512

#endif
