// Products of 16 rows of x with 64 columns of a panel by tiles, which AMX has: eight registers of
// 16 rows of 64 bytes. The panel is the one that vectors read: a row of it has four bytes for each
// column, two bfloat16 or four integers, which is how tiles want weights.
//
// Kernels are templates over the tiles: HardwareTiles, or ModelTiles, which do in plain C++ what
// Intel's manual says, so that the kernels run where there is no AMX.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "packed.hpp"
#include "vec.hpp"

namespace respike {

constexpr std::int64_t amx_rows = 16;
constexpr std::int64_t amx_bytes = 64;  // of a row

// In the place of tiles: products are by vectors.
struct NoTiles {
  explicit NoTiles(std::int64_t) {}
};

// Operand of LDTILECFG. Tiles 0 to 3 take sums; 4 takes rows of x, `depth` bytes of each; 5 and on
// take weights.
struct alignas(amx_bytes) TileShapes {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t bytes[16] = {};  // of a row
  std::uint8_t rows[16] = {};

  explicit TileShapes(std::int64_t depth) {
    for (int tile = 0; tile < 8; ++tile) {
      bytes[tile] = static_cast<std::uint16_t>(tile == 4 ? depth : amx_bytes);
      rows[tile] = static_cast<std::uint8_t>(tile > 4 ? depth / 4 : amx_rows);
    }
  }
};
static_assert(sizeof(TileShapes) == amx_bytes, "as LDTILECFG reads it");

#if RESPIKE_X86

// The tiles of this thread, from here until the end of the block. X, bf16 or int8, is what the
// bytes of x are; weights are bf16, or unsigned.
//
// Assembly, because GCC's intrinsics do not tell the compiler which memory they read: GCC 12 drops
// the stores before them.
template <class X>
class HardwareTiles {
 public:
  RESPIKE_AMX explicit HardwareTiles(std::int64_t depth) : depth(depth) {
    const TileShapes shapes(depth);
    asm volatile("ldtilecfg %0" : : "m"(shapes));
  }
  RESPIKE_AMX ~HardwareTiles() { asm volatile("tilerelease"); }
  HardwareTiles(const HardwareTiles&) = delete;
  HardwareTiles& operator=(const HardwareTiles&) = delete;

  template <int T>
  RESPIKE_AMX RESPIKE_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
  }
  template <int T>
  RESPIKE_AMX RESPIKE_INLINE void load(const void* from, std::int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  RESPIKE_AMX RESPIKE_INLINE void store(void* to, std::int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
  }
  template <int SUM, int WEIGHTS>
  RESPIKE_AMX RESPIKE_INLINE void dot() {
    if constexpr (std::is_same_v<X, bf16>) {
      asm volatile("tdpbf16ps %%tmm%c1, %%tmm4, %%tmm%c0" : : "i"(SUM), "i"(WEIGHTS));
    } else {
      asm volatile("tdpbsud %%tmm%c1, %%tmm4, %%tmm%c0" : : "i"(SUM), "i"(WEIGHTS));
    }
  }

  const std::int64_t depth;
};

#endif  // RESPIKE_X86

// The same in plain C++. bfloat16 is multiplied and added in float32 to nearest, subnormals taken
// and given as zero; even and odd inputs have a sum each, which the end of a tile adds.
template <class X>
class ModelTiles {
 public:
  explicit ModelTiles(std::int64_t depth) : depth(depth), shapes_(depth) {}

  template <int T>
  void zero() {
    std::memset(tiles_[T], 0, sizeof tiles_[T]);
  }
  template <int T>
  void load(const void* from, std::int64_t stride) {
    const auto* row = static_cast<const std::uint8_t*>(from);
    for (int i = 0; i < shapes_.rows[T]; ++i, row += stride) {
      std::memcpy(tiles_[T][i], row, shapes_.bytes[T]);
    }
  }
  template <int T>
  void store(void* to, std::int64_t stride) {
    auto* row = static_cast<std::uint8_t*>(to);
    for (int i = 0; i < shapes_.rows[T]; ++i, row += stride) {
      std::memcpy(row, tiles_[T][i], shapes_.bytes[T]);
    }
  }
  template <int SUM, int WEIGHTS>
  void dot() {
    for (int m = 0; m < shapes_.rows[4]; ++m) {
      for (int n = 0; n < shapes_.bytes[WEIGHTS] / 4; ++n) {
        std::uint8_t* sum = tiles_[SUM][m] + 4 * n;
        if constexpr (std::is_same_v<X, bf16>) {
          float even = 0.0f, odd = 0.0f;
          for (int k = 0; k < shapes_.bytes[4] / 4; ++k) {
            const std::uint8_t *x = tiles_[4][m] + 4 * k, *w = tiles_[WEIGHTS][k] + 4 * n;
            even = normal(std::fma(at<bf16>(x), at<bf16>(w), even));
            odd = normal(std::fma(at<bf16>(x + 2), at<bf16>(w + 2), odd));
          }
          const float total = normal(normal(at<float>(sum)) + normal(even + odd));
          std::memcpy(sum, &total, sizeof total);
        } else {
          std::int32_t total;
          std::memcpy(&total, sum, sizeof total);
          for (int i = 0; i < shapes_.bytes[4]; ++i) {
            const std::uint8_t weight = tiles_[WEIGHTS][i / 4][4 * n + i % 4];
            total += static_cast<std::int8_t>(tiles_[4][m][i]) * weight;
          }
          std::memcpy(sum, &total, sizeof total);
        }
      }
    }
  }

  const std::int64_t depth;

 private:
  static float normal(float value) {
    const bool subnormal = std::fabs(value) < std::numeric_limits<float>::min();
    return subnormal ? std::copysign(0.0f, value) : value;
  }
  template <class E>
  static float at(const std::uint8_t* place) {
    E value;
    std::memcpy(&value, place, sizeof value);
    return normal(respike::load(&value));
  }

  TileShapes shapes_;
  alignas(amx_bytes) std::uint8_t tiles_[8][amx_rows][amx_bytes] = {};
};

// `rows` rows of x, `bytes` of each, and zeros: 16 rows of 64 bytes that no buffer ends in.
inline void fill_edge(std::uint8_t* edge, const std::uint8_t* x, std::int64_t stride,
                      std::int64_t rows, std::int64_t bytes) {
  std::memset(edge, 0, amx_rows * amx_bytes);
  for (std::int64_t m = 0; m < rows; ++m) std::memcpy(edge + m * amx_bytes, x + m * stride, bytes);
}

// out (16, 64), float32 or int32, = x times a panel whose rows are 256 bytes; of x the first 16 of
// `rows` rows, `bytes` of each, and zeros for what there is not. The panel has all rows that the
// last tile reads, and no NaN in them.
template <class Tiles>
RESPIKE_AMX RESPIKE_INLINE void multiply_tiles(Tiles& tiles, const void* x, std::int64_t stride,
                                               std::int64_t rows, std::int64_t bytes,
                                               const void* panel, void* out) {
  constexpr std::int64_t panel_bytes = 4 * tile_width;
  alignas(amx_bytes) std::uint8_t edge[amx_rows * amx_bytes];
  const auto* from = static_cast<const std::uint8_t*>(x);
  const auto* weights = static_cast<const std::uint8_t*>(panel);
  auto* sums = static_cast<std::uint8_t*>(out);
  tiles.template zero<0>();
  tiles.template zero<1>();
  tiles.template zero<2>();
  tiles.template zero<3>();
  for (std::int64_t at = 0; at < bytes; at += tiles.depth) {
    const std::int64_t here = std::min(tiles.depth, bytes - at);
    if (rows >= amx_rows && here == tiles.depth) {
      tiles.template load<4>(from + at, stride);
    } else {
      fill_edge(edge, from + at, stride, std::min(rows, amx_rows), here);
      tiles.template load<4>(edge, amx_bytes);
    }
    tiles.template load<5>(weights, panel_bytes);
    tiles.template dot<0, 5>();
    tiles.template load<6>(weights + amx_bytes, panel_bytes);
    tiles.template dot<1, 6>();
    tiles.template load<5>(weights + 2 * amx_bytes, panel_bytes);
    tiles.template dot<2, 5>();
    tiles.template load<6>(weights + 3 * amx_bytes, panel_bytes);
    tiles.template dot<3, 6>();
    weights += tiles.depth / 4 * panel_bytes;
  }
  tiles.template store<0>(sums, panel_bytes);
  tiles.template store<1>(sums + amx_bytes, panel_bytes);
  tiles.template store<2>(sums + 2 * amx_bytes, panel_bytes);
  tiles.template store<3>(sums + 3 * amx_bytes, panel_bytes);
}

}  // namespace respike
