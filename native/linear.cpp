// Packed linear layers. The definition is respike.ops.linear.packed_linear_definition.
//
// Work is cut by tiles (and, for many rows of x, by blocks of rows), each done whole by one thread
// in a fixed order: the bits do not depend on the number of threads. x is read as float32, or as
// it is by the kernels that multiply bfloat16.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "kernels.hpp"
#include "pool.hpp"
#include "vec.hpp"

namespace respike {

using std::int64_t;

namespace {

constexpr int64_t few = 8;             // rows of x for which streaming beats a panel (measured)
constexpr int64_t block_rows = 240;    // rows of x that share a panel: sums stay in the L2 cache
constexpr int64_t panel_depth = 256;   // inputs in a panel; a multiple of every group size
constexpr int64_t serial_work = 1 << 16;  // products; fewer are not worth waking a thread
constexpr int64_t chunk_inputs = 32;   // inputs in hand while rows of x pass; divides every group
constexpr int64_t ahead_inputs = 96;   // from the end of a chunk to what is prefetched (measured)

// Asks for the weights of `count` inputs that are needed soon. Tiles follow each other, so past the
// end of one the next begins; past the end of all, asking does nothing.
template <class Kind>
void prefetch([[maybe_unused]] const Tile& tile, [[maybe_unused]] int64_t from,
              [[maybe_unused]] int64_t count) {
#if defined(__GNUC__)
  const std::uint8_t* first = tile.rows + from * Kind::row_bytes;
  for (int64_t i = 0; i < count * Kind::row_bytes; i += 64) {
    __builtin_prefetch(first + i, 0, 2);
  }
#endif
}

}  // namespace
}  // namespace respike

#define RESPIKE_KERNELS "linear_kernels.inc"
#include "each_level.hpp"
#include "linear_pairs.hpp"

namespace respike {
namespace {

// What one level does with one kind of weights; sums (rows, 64) and a panel are scratch.
struct Kernels {
  void (*few_rows)(const Tile&, const Rows<float>&, float* sums, float* panel);
  void (*many_rows)(const Tile&, const Rows<float>&, float* sums, float* panel);
  void (*many_pairs)(const Tile&, const Rows<bf16>&, float* sums, float* panel);  // null: not here
};

template <class Kind>
Kernels kernels_of([[maybe_unused]] Level level) {
#if RESPIKE_X86
  if (level >= Level::avx512) {
    const bool pairs = level >= Level::avx512bf16 && !std::is_same_v<Kind, WeightF32>;
    return {avx512::few_rows<Kind>, avx512::many_rows<Kind>,
            pairs ? avx512::many_pairs<Kind> : nullptr};
  }
  if (level >= Level::avx2) return {avx2::few_rows<Kind>, avx2::many_rows<Kind>, nullptr};
#endif
  return {portable::few_rows<Kind>, portable::many_rows<Kind>, nullptr};
}

Kernels kernels_for(Level level, Kind kind) {
  switch (kind) {
    case Kind::f32: return kernels_of<WeightF32>(level);
    case Kind::bf16: return kernels_of<WeightBF16>(level);
    case Kind::int8: return kernels_of<WeightInt8>(level);
    case Kind::int4: return kernels_of<WeightInt4>(level);
  }
  throw std::invalid_argument("unknown kind of packed weights");
}

template <class T>
using Finish = void (*)(const Tile&, const float* sums, int64_t rows, T* out, int64_t stride);

template <class T>
Finish<T> finish_of([[maybe_unused]] Level level) {
#if RESPIKE_X86
  if (level >= Level::avx512) return avx512::finish<T>;
  if (level >= Level::avx2) return avx2::finish<T>;
#endif
  return portable::finish<T>;
}

int64_t bytes_per_row(Kind kind) {
  constexpr int64_t bytes[] = {WeightF32::row_bytes, WeightBF16::row_bytes, WeightInt8::row_bytes,
                               WeightInt4::row_bytes};
  return bytes[static_cast<int>(kind)];
}

Tile tile_at(const PackedWeights& w, int64_t index) {
  const int64_t groups = (w.inputs + w.group - 1) / w.group;
  const int64_t column = index * tile_width;
  Tile tile;
  tile.rows = w.data + index * w.inputs * bytes_per_row(w.kind);
  tile.scales = w.scales == nullptr ? nullptr : w.scales + index * groups * tile_width;
  tile.bias = w.bias == nullptr ? nullptr : w.bias + column;
  tile.inputs = w.inputs;
  tile.group = w.group;
  tile.outputs = std::min<int64_t>(tile_width, w.outputs - column);
  return tile;
}

// float32 scratch that starts on a cache line; kept, because the next call needs it again.
float* scratch(int64_t elements) {
  thread_local std::vector<float> kept;
  const auto size = static_cast<std::size_t>(elements) + 16;
  if (kept.size() < size) kept.resize(size);
  const auto address = reinterpret_cast<std::uintptr_t>(kept.data());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

// Every (tile, block of at most block_rows rows): sums by kernel(tile, rows, sums, panel), and
// from them the outputs.
template <class X, class T, class Kernel>
void each_block(const PackedWeights& w, const Rows<X>& all, T* out, Finish<T> finish, int threads,
                const Kernel& kernel) {
  const int64_t tiles = (w.outputs + tile_width - 1) / tile_width;
  const int64_t row_blocks = (all.count + block_rows - 1) / block_rows;
  const int64_t block = (all.count + row_blocks - 1) / row_blocks;
  const int64_t each = (panel_depth + block) * tile_width;
  float* memory = scratch(each * threads);
  parallel_for(threads, tiles * row_blocks, [&](int64_t index, int slot) {
    const int64_t column = index / row_blocks * tile_width;
    const int64_t from = index % row_blocks * block;
    const Tile tile = tile_at(w, index / row_blocks);
    const Rows<X> rows{all.x + from * all.stride, std::min(block, all.count - from), all.stride};
    float* panel = memory + slot * each;
    float* sums = panel + panel_depth * tile_width;
    kernel(tile, rows, sums, panel);
    finish(tile, sums, rows.count, out + from * w.outputs + column, w.outputs);
  });
}

const float* as_float(const float* x, int64_t) { return x; }
const float* as_float(const bf16* x, int64_t elements) {
  thread_local std::vector<float> kept;
  const auto size = static_cast<std::size_t>(elements);
  if (kept.size() < size) kept.resize(size);
  float* converted = kept.data();
  for (std::size_t i = 0; i < size; ++i) converted[i] = load(x + i);
  return converted;
}

// Pairs of inputs are read at once, so rows of odd length get a zero at their end.
Rows<bf16> even_rows(const bf16* x, int64_t count, int64_t inputs) {
  if (inputs % 2 == 0) return {x, count, inputs};
  thread_local std::vector<bf16> kept;
  kept.assign(static_cast<std::size_t>(count * (inputs + 1)), bf16{0});
  for (int64_t m = 0; m < count; ++m) {
    std::copy(x + m * inputs, x + (m + 1) * inputs, kept.data() + m * (inputs + 1));
  }
  return {kept.data(), count, inputs + 1};
}

}  // namespace

template <class T>
void packed_linear(Level level, int threads, const T* x, const PackedWeights& w, T* out,
                   int64_t rows) {
  const Kernels kernels = kernels_for(level, w.kind);
  const Finish<T> finish = finish_of<T>(level);
  if (rows == 0 || w.outputs == 0) return;
  const int64_t work = std::min(rows, few) * w.outputs * w.inputs;
  threads = work < serial_work ? 1 : std::clamp(threads, 1, max_threads);
  if constexpr (std::is_same_v<T, bf16>) {
    if (rows > few && kernels.many_pairs != nullptr) {
      const Rows<bf16> all = even_rows(x, rows, w.inputs);
      return each_block(w, all, out, finish, threads, kernels.many_pairs);
    }
  }
  const Rows<float> all{as_float(x, rows * w.inputs), rows, w.inputs};
  if (rows > few) return each_block(w, all, out, finish, threads, kernels.many_rows);
  each_block(w, all, out, finish, threads, kernels.few_rows);
}

template void packed_linear(Level, int, const float*, const PackedWeights&, float*, int64_t);
template void packed_linear(Level, int, const bf16*, const PackedWeights&, bf16*, int64_t);

}  // namespace respike
