// What the files of the packed linear layers share: linear.cpp cuts the work, linear_exact.cpp
// multiplies x as it is, linear_rounded.cpp x rounded to int8.
#pragma once

#include "kernels.hpp"

namespace respike {

using std::int64_t;

constexpr int64_t few = 8;             // rows of x for which streaming beats a panel (measured)
constexpr int64_t block_rows = 240;    // rows of x that share a panel: sums stay in the L2 cache
constexpr int64_t panel_depth = 256;   // inputs in a panel; a multiple of every group size
constexpr int64_t chunk_inputs = 32;   // inputs in hand while rows of x pass; divides every group
constexpr int64_t ahead_inputs = 96;   // from the end of a chunk to what is prefetched (measured)

constexpr int64_t rounded_ahead_inputs = 256;  // likewise, for few rows rounded to int8 (measured)

// Asks for the weights of `count` inputs that are needed soon. Tiles follow each other, so past the
// end of one the next begins; past the end of all, asking does nothing.
template <class Kind>
inline void prefetch([[maybe_unused]] const Tile& tile, [[maybe_unused]] int64_t from,
                     [[maybe_unused]] int64_t count) {
#if defined(__GNUC__)
  const std::uint8_t* first = tile.rows + from * Kind::row_bytes;
  for (int64_t i = 0; i < count * Kind::row_bytes; i += 64) {
    __builtin_prefetch(first + i, 0, 2);
  }
#endif
}

// What one level does with one kind of weights; sums (rows, 64) and a panel of panel_depth * 64
// floats are scratch.
struct ExactKernels {
  void (*few_rows)(const Tile&, const Rows<float>&, float* sums, float* panel);
  void (*many_rows)(const Tile&, const Rows<float>&, float* sums, float* panel);
  void (*many_pairs)(const Tile&, const Rows<bf16>&, float* sums, float* panel);  // null: not here
};

ExactKernels exact_kernels(Level level, Kind kind);

// Writes the sums (rows, 64) of a tile as outputs, with the bias.
template <class T>
using Finish = void (*)(const Tile&, const float* sums, int64_t rows, T* out, int64_t stride);

template <class T>
Finish<T> finish_kernel(Level level);

// Rows of x rounded to int8, a scale for each row and group of inputs.
struct RoundedRows {
  std::int8_t* x;        // (count, stride): inputs, and zeros up to a multiple of four
  float* scales;         // (count, groups)
  std::int32_t* totals;  // (count, groups): sums of the integers
  int64_t count;
  int64_t stride;
  int64_t groups;

  // Those from `row` on, from an input on that is the first of its group.
  RoundedRows at(int64_t row, int64_t input, int64_t group) const {
    return {x + row * stride + input,       scales + row * groups + group,
            totals + row * groups + group, count - row, stride, groups};
  }
};

// Rounds `inputs` values of one row.
template <class T>
using RoundRow = void (*)(const T* x, int64_t inputs, int64_t group, std::int8_t* out,
                          float* scales, std::int32_t* totals);

template <class T>
RoundRow<T> round_row_kernel(Level level);

using RoundedKernel = void (*)(const Tile&, const RoundedRows&, float* sums, float* panel);

// For calls with `rows` rows of x. Null for kinds without scales.
RoundedKernel rounded_kernel(Level level, Kind kind, int64_t rows);

}  // namespace respike
