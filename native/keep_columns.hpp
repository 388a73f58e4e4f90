// Queries of a tile, and tokens that some of them see for a time: what softmax makes of them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "scratch.hpp"
#include "softmax.hpp"
#include "vec.hpp"

namespace respike {

// A token, and which tokens of a tile see it: [from, until).
template <class T>
struct Column {
  const T *k, *v;
  std::int64_t from, until;

  bool seen_by(std::int64_t token) const { return from <= token && token < until; }
  bool seen_by_all(std::int64_t first, std::int64_t last) const {
    return from <= first && until == last;
  }
};

// Keys and values of `count` columns, one after the other.
template <class T>
void gather(const Column<T>* columns, std::int64_t count, std::int64_t dim, T* k, T* v) {
  for (std::int64_t c = 0; c < count; ++c) {
    std::copy_n(columns[c].k, dim, k + c * dim);
    std::copy_n(columns[c].v, dim, v + c * dim);
  }
}

// Those that tokens [first, last) all see come first: their blocks need no mask.
template <class T>
void whole_first(Column<T>* columns, std::int64_t count, std::int64_t first, std::int64_t last) {
  std::stable_partition(columns, columns + count,
                        [=](const Column<T>& c) { return c.seen_by_all(first, last); });
}

// Queries (tokens, heads, dim), heads of a group together.
template <class T>
struct Queries {
  const T* q;
  std::int64_t stride;  // from token to token
  std::int64_t heads, dim;
  float scale;  // of scores
};

// Tokens whose queries share a tile.
inline std::int64_t tile_tokens(std::int64_t heads, std::int64_t most) {
  return std::clamp<std::int64_t>(tile_rows / heads, 1, most);
}

template <class T>
class ColumnTile {
 public:
  ColumnTile(Level level, const Queries<T>& queries, std::int64_t most, Desk& desk)
      : parts_(softmax_parts<T, T>(level)), finish_(softmax_parts<float, float>(level).finish),
        queries_(queries) {
    const std::int64_t rows = most * queries.heads, dim = queries.dim;
    cells_ = desk.take<float>(rows * query_row(dim));
    state_ = desk.take<float>(state_floats(rows, dim));
    block_.keys = desk.take<float>(key_panel(dim));
    block_.values = desk.take<float>(value_panel(dim));
    block_.window = without_window;
    bias_ = desk.take<float>(most * block_keys);
    k_ = desk.take<T>(block_keys * dim);
    v_ = desk.take<T>(block_keys * dim);
  }

  // What tokens [first, last), each of which sees a column, make of them, see whole_first: means,
  // `mean_stride` floats from token to token, and the logarithms of denominators, likewise.
  void attend(const Column<T>* columns, std::int64_t count, std::int64_t first, std::int64_t last,
              float* mean, std::int64_t mean_stride, float* log_mass, std::int64_t mass_stride) {
    const std::int64_t dim = queries_.dim;
    SoftmaxTile tile{};
    tile.rows = (last - first) * queries_.heads;
    tile.heads = queries_.heads;
    tile.head_dim = tile.value_dim = dim;
    tile.position = block_keys;  // behind all keys of a block, which begins at 0
    tile.factor = queries_.scale * log2_e;
    tile.q = cells_;
    clear(tile, state_);
    parts_.load_queries(queries_.q + first * queries_.stride, queries_.stride, last - first, tile,
                        cells_);
    for (std::int64_t begin = 0; begin < count; begin += block_keys) {
      const Column<T>* some = columns + begin;
      block_.count = std::min(block_keys, count - begin);
      gather(some, block_.count, dim, k_, v_);
      const bool whole = some[block_.count - 1].seen_by_all(first, last);
      block_.bias = whole ? nullptr : bias_;
      if (!whole) hide(some, first, last);
      Keys<T> keys;
      keys.k = k_;
      keys.v = v_;
      keys.stride = dim;
      keys.count = block_.count;
      parts_.pack(keys, tile, block_);
      parts_.attend(tile, block_, 0, tile.rows);
    }
    finish_(tile, mean, mean_stride, log_mass, mass_stride);
  }

 private:
  void hide(const Column<T>* some, std::int64_t first, std::int64_t last) {
    for (std::int64_t t = first; t < last; ++t) {
      float* row = bias_ + (t - first) * block_keys;
      for (std::int64_t c = 0; c < block_.count; ++c) {
        row[c] = some[c].seen_by(t) ? 0.0f : minus_infinity;
      }
    }
  }

  const SoftmaxParts<T, T> parts_;
  void (*const finish_)(const SoftmaxTile&, float*, std::int64_t, float*, std::int64_t);
  const Queries<T> queries_;
  KeyBlock block_{};
  float *cells_, *state_, *bias_;
  T *k_, *v_;
};

}  // namespace respike
