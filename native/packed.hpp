// The packed weight layout; respike.ops.packed defines it and says why it is so.
//
// The matrix is cut into tiles of 64 outputs. A tile is one row of 64 weights for each input, in
// order; rows of int4 hold outputs c and c + 32 in the low and high half of byte c. The integer
// kinds have one float16 scale for each output and `group` inputs: 64 a group, tile by tile.
#pragma once

#include <algorithm>
#include <cstdint>

#include "bf16.hpp"

namespace respike {

constexpr int tile_width = 64;

// Numbers are indices of respike.ops.packed.KINDS.
enum class Kind { f32 = 0, bf16 = 1, int8 = 2, int4 = 3 };

// The kinds as types, for overloads: bytes a row, and whether there are scales.
struct WeightF32 {
  static constexpr std::int64_t row_bytes = 256;
  static constexpr bool scaled = false;
};
struct WeightBF16 {
  static constexpr std::int64_t row_bytes = 128;
  static constexpr bool scaled = false;
};
struct WeightInt8 {
  static constexpr std::int64_t row_bytes = 64;
  static constexpr bool scaled = true;
};
struct WeightInt4 {
  static constexpr std::int64_t row_bytes = 32;
  static constexpr bool scaled = true;
};

// One tile of a packed matrix.
struct Tile {
  const std::uint8_t* rows;
  const std::uint16_t* scales;  // float16; null for kinds without
  const float* bias;            // of this tile's outputs; null: none
  std::int64_t inputs;
  std::int64_t group;    // inputs that share a scale
  std::int64_t outputs;  // 1 to 64; the others are padding
  std::int64_t scales_row = tile_width;  // from the scales of one group to the next
};

// Rows of x; X is what the kernel reads.
template <class X>
struct Rows {
  const X* x;
  std::int64_t count;
  std::int64_t stride;  // from one row to the next, in elements
};

inline float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000) << 16;
  const std::uint32_t rest = half & 0x7fff;
  if (rest < 0x0400) {  // zero and subnormals: units of 2^-24
    const float value = static_cast<float>(rest) * 5.9604644775390625e-8f;
    return sign ? -value : value;
  }
  const std::uint32_t exponent = rest >= 0x7c00 ? 0xffu << 23 : ((rest >> 10) + 112) << 23;
  const std::uint32_t bits = sign | exponent | ((rest & 0x3ff) << 13);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The weights of row `row` in output `column`, before scaling.
inline float weight_at(WeightF32, const std::uint8_t* row, int column) {
  float value;
  std::memcpy(&value, row + 4 * column, sizeof value);
  return value;
}
inline float weight_at(WeightBF16, const std::uint8_t* row, int column) {
  bf16 value;
  std::memcpy(&value, row + 2 * column, sizeof value);
  return load(&value);
}
inline float weight_at(WeightInt8, const std::uint8_t* row, int column) {
  return static_cast<std::int8_t>(row[column]);
}
inline float weight_at(WeightInt4, const std::uint8_t* row, int column) {
  const int nibble = column < 32 ? row[column] & 15 : row[column - 32] >> 4;
  return static_cast<float>(nibble - 2 * (nibble & 8));
}

}  // namespace respike
