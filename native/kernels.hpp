// Every kernel the module binds. Buffers are contiguous and never overlap unless said.
#pragma once

#include <cstdint>

#include "bf16.hpp"
#include "cpu.hpp"
#include "packed.hpp"

namespace respike {

// out = weight * round(x / sqrt(mean(x^2) + eps)), per row of `cols` elements; sums in float32.
template <class T>
void rms_norm(Level level, const T* x, const T* weight, T* out, std::int64_t rows,
              std::int64_t cols, float eps);

// A packed matrix, see packed.hpp.
struct PackedWeights {
  Kind kind;
  const std::uint8_t* data;
  const std::uint16_t* scales;  // null for kinds without
  const float* bias;            // null: none
  std::int64_t inputs;
  std::int64_t outputs;
  std::int64_t group;  // 32, 64 or 128 inputs
};

// out (rows, outputs) = round(x (rows, inputs) @ weights + bias); sums in float32.
template <class T>
void packed_linear(Level level, int threads, const T* x, const PackedWeights& weights, T* out,
                   std::int64_t rows);

}  // namespace respike
