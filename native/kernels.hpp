// Every kernel the module binds. Buffers are contiguous and never overlap unless said.
#pragma once

#include <cstdint>

#include "bf16.hpp"
#include "cpu.hpp"

namespace respike {

// out = weight * round(x / sqrt(mean(x^2) + eps)), per row of `cols` elements; sums in float32.
template <class T>
void rms_norm(Level level, const T* x, const T* weight, T* out, std::int64_t rows,
              std::int64_t cols, float eps);

}  // namespace respike
