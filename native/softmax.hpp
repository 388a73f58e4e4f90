// Softmax attention over sinks, a window, or everything before: whole jobs, and the blocks they are
// made of for kernels that choose their keys themselves.
//
// The definition is respike.ops.softmax.window_softmax_definition. T, the type of queries and
// outputs, is float or bf16; E, that of cached keys and values, is T or int8_t.
#pragma once

#include <cstdint>

#include "bf16.hpp"
#include "packed.hpp"

namespace respike {

// Keys and values of one KV group: row i of k at i * stride, and so of v unless v_stride says
// otherwise.
template <class E>
struct Keys {
  const E* k = nullptr;
  const E* v = nullptr;
  std::int64_t stride = 0;
  std::int64_t count = 0;
  // Of int8: what row i of k and of v is to be multiplied by. Of other types null.
  const float* k_scale = nullptr;
  const float* v_scale = nullptr;
  std::int64_t v_stride = 0;  // 0: stride
  std::int64_t value_stride() const { return v_stride == 0 ? stride : v_stride; }
};

// One KV group of one sequence. Every query must see a key. What no query of a job sees is not
// read; NaN in a key that one query sees may reach the others.
template <class T, class E = T>
struct SoftmaxJob {
  const T* q;             // (tokens, heads, head_dim), heads of the group together; rotated
  const T* q_sink;        // as q, for the scores of sinks; may be q
  std::int64_t q_stride;  // from one token to the next
  Keys<E> sinks;          // at positions 0, 1, ..
  Keys<E> keys;           // key i at position first + i; none of them a sink
  std::int64_t first;
  std::int64_t start;     // query t is at position start + t
  std::int64_t tokens, heads, head_dim, value_dim;
  std::int64_t window;    // a query at p sees keys at p - window < j <= p, and sinks at j <= p
  float scale;            // of scores
  T* out;                 // (tokens, heads, value_dim)
  std::int64_t out_stride;
  float* log_mass;        // (tokens, heads), logarithm of the denominator; null: not wanted
  std::int64_t mass_stride;
};

// One query or many: long caches are cut into pieces, so that few queries keep all threads busy.
// What is cut where depends on the job alone, and so do the bits.
template <class T, class E>
void softmax(Level level, int threads, const SoftmaxJob<T, E>* jobs, std::int64_t count);

// ---- the parts

constexpr std::int64_t block_keys = tile_width;
constexpr std::int64_t tile_rows = 192;  // queries that share a packed block (measured)
constexpr std::int64_t lanes_of_mass = 16;
constexpr std::int64_t without_window = std::int64_t{1} << 62;

// Queries, row (token * heads + head), and what they have seen of their softmax.
struct SoftmaxTile {
  std::int64_t rows, heads, head_dim, value_dim;
  std::int64_t position;  // of token 0
  float factor;           // scale * log2(e)
  const void* q;          // cells of the level, from SoftmaxParts::load_queries
  float* top;             // (rows), near the highest score, in powers of two; at first -inf
  float* mass;            // (rows, 16): the denominator's partial sums, times 2^-top; at first 0
  float* out;             // (value_dim / 64, rows, 64): the numerator, likewise
};

// Rows of keys and values that will be packed next; strides and sizes in bytes.
struct Wanted {
  const char* k;
  const char* v;
  std::int64_t k_stride, v_stride, k_bytes, v_bytes;
  std::int64_t count;  // at most 64
};

// Keys and values as the products read them.
struct KeyBlock {
  std::int64_t count;          // 1 to 64
  std::int64_t first;          // position of the first
  std::int64_t window;         // at most without_window
  float* keys;                 // transposed: (head_dim, 64), as cells
  float* values;               // (value_dim / 64, 64, 64), as cells
  const float* key_scales;     // (64), or null
  const float* value_scales;   // likewise
  Wanted wanted;               // fetched meanwhile
  const float* bias;           // (tokens of the tile, 64), added to scores * factor, or null
};

// Numbers a row of queries takes, floats of a block and of the state of a tile.
constexpr std::int64_t query_row(std::int64_t head_dim) { return (head_dim + 1) / 2 * 2; }
constexpr std::int64_t value_tiles(std::int64_t value_dim) {
  return (value_dim + tile_width - 1) / tile_width;
}
constexpr std::int64_t key_panel(std::int64_t head_dim) { return head_dim * block_keys; }
constexpr std::int64_t value_panel(std::int64_t value_dim) {
  return value_tiles(value_dim) * block_keys * tile_width;
}
constexpr std::int64_t state_floats(std::int64_t rows, std::int64_t value_dim) {
  return (rows + 15) / 16 * 16 + rows * (lanes_of_mass + value_tiles(value_dim) * tile_width);
}

// What one level does. All buffers start on a cache line.
template <class T, class E>
struct SoftmaxParts {
  // Queries of `tokens` tokens as cells, query_row() floats a row.
  void (*load_queries)(const T* q, std::int64_t stride, std::int64_t tokens,
                       const SoftmaxTile& tile, void* cells);
  // Fills block.keys and block.values with the first block.count rows of `from`.
  void (*pack)(const Keys<E>& from, const SoftmaxTile& tile, const KeyBlock& block);
  // Shows a block to rows [first, last) of a tile.
  void (*attend)(const SoftmaxTile& tile, const KeyBlock& block, std::int64_t first,
                 std::int64_t last);
  // Shows all of a block, without bias, to `count` rows that lie anywhere; the same bits.
  void (*attend_some)(const SoftmaxTile& tile, const KeyBlock& block, const std::int32_t* rows,
                      std::int64_t count);
  // What `other` has seen, the tile has seen too.
  void (*merge)(const SoftmaxTile& tile, const SoftmaxTile& other);
  // Outputs, and log_mass unless null.
  void (*finish)(const SoftmaxTile& tile, T* out, std::int64_t out_stride, float* log_mass,
                 std::int64_t mass_stride);
};

template <class T, class E>
SoftmaxParts<T, E> softmax_parts(Level level);

// A tile that has seen nothing, its state in `state`, state_floats() of them.
void clear(SoftmaxTile& tile, float* state);

}  // namespace respike
