// Linear layers that are fed spike counts, by events.
#pragma once

#include "kernels.hpp"

namespace respike {

// The weight of a row in output `column`, before scaling.
inline std::int32_t integer_at(WeightInt8, const std::uint8_t* row, int column) {
  return static_cast<std::int8_t>(row[column]);
}
inline std::int32_t integer_at(WeightInt4, const std::uint8_t* row, int column) {
  const std::int32_t nibble = column < 32 ? row[column] & 15 : row[column - 32] >> 4;
  return nibble - 2 * (nibble & 8);
}

// out (rows, outputs) = step (rows) * (counts (rows, inputs) @ weights) + bias; weights of inputs
// whose count is zero are not read. Rows are few: each walks the weights on its own.
void spike_linear(Level level, int threads, const std::int32_t* counts, const float* step,
                  const PackedWeights& weights, float* out, std::int64_t rows);

}  // namespace respike
