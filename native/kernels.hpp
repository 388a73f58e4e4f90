// Every kernel the module binds. Buffers are contiguous and never overlap unless said.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bf16.hpp"
#include "cpu.hpp"
#include "packed.hpp"

namespace respike {

// out = weight * round(x / sqrt(mean(x^2) + eps)), per row of `cols` elements; sums in float32.
template <class T>
void rms_norm(Level level, int threads, const T* x, const T* weight, T* out, std::int64_t rows,
              std::int64_t cols, float eps);

// sum = round(x + residual); out = the RMSNorm of sum. sum may be x.
template <class T>
void add_rms_norm(Level level, int threads, const T* x, const T* residual, const T* weight, T* sum,
                  T* out, std::int64_t rows, std::int64_t cols, float eps);

// out = round(x + y), rows of `cols` elements; out may be either.
template <class T>
void add(Level level, int threads, const T* x, const T* y, T* out, std::int64_t rows,
         std::int64_t cols);

// out (rows, cols) = round(silu(gate)) * up; rows of gate and up are strides apart.
template <class T>
void swiglu(Level level, int threads, const T* gate, std::int64_t gate_stride, const T* up,
            std::int64_t up_stride, T* out, std::int64_t rows, std::int64_t cols);

// Turns pairs (i, half + i) of each head by the angle whose cosine and sine are cos, sin
// (tokens, half). Tokens of x (heads, 2 * half each) are `stride` apart; out may be x.
template <class T>
void rotate(Level level, int threads, const T* x, std::int64_t stride, const float* cos,
            const float* sin, T* out, std::int64_t out_stride, std::int64_t tokens,
            std::int64_t heads, std::int64_t half);

// Asks the system to back [start, start + bytes) with huge pages; false if it will not.
bool advise_huge_pages(void* start, std::size_t bytes);

// Reads memory in order, for measuring how fast that is; the exclusive or of all words.
std::uint64_t read_all(const std::uint64_t* start, std::int64_t words);

// Rounds weights (rows, cols) to integers -8..7, `group` (32, 64 or 128) of a row sharing a float16
// scale (rows, groups): of the candidates "largest weight / step" the one of least squared error.
void search_int4(Level level, int threads, const float* weights, std::int64_t rows,
                 std::int64_t cols, std::int64_t group, const float* steps,
                 std::int64_t num_steps, std::int8_t* integers, std::uint16_t* scales);

// From one tile and one row to the next: of the data in bytes, of the scales (whose rows are groups)
// in elements.
struct Strides {
  std::int64_t tile;
  std::int64_t row;
  std::int64_t scales_tile;
  std::int64_t scales_row;
};

// A packed matrix, see packed.hpp.
struct PackedWeights {
  Kind kind;
  const std::uint8_t* data;
  const std::uint16_t* scales;  // null for kinds without
  const float* bias;            // null: none
  std::int64_t inputs;
  std::int64_t outputs;
  std::int64_t group;  // 32, 64 or 128 inputs
  Strides strides;     // for spikes.hpp only: all else takes tiles one behind the other
};

// How x is read. int8: each row is rounded to int8 with a scale for each scale group of inputs;
// products and their sums over a group are integers, and the same at every level.
enum class Activations { exact = 0, int8 = 1 };

// One of several matrices that are fed by the same x.
template <class T>
struct PackedLinearJob {
  PackedWeights weights;
  T* out;
  std::int64_t out_stride;  // from one row to the next, in elements
};

// out (rows, outputs) = round(x (rows, inputs) @ weights + bias) for each job; sums in float32.
template <class T>
void packed_linears(Level level, int threads, const T* x, std::int64_t rows,
                    const PackedLinearJob<T>* jobs, std::int64_t count, Activations how);

}  // namespace respike
