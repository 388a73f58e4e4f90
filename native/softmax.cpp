// Softmax attention. The definition is respike.ops.softmax.window_softmax_definition.
//
// The tokens of a job are cut into tiles of about 192 queries (the heads of a group share keys, so
// they are rows of one product) and the keys into blocks of 64, packed once a tile. A tile takes
// block after block and keeps, for each query, a running maximum, denominator and numerator. A job
// of one tile, such as a decoding step, has its keys cut into pieces instead, whose sums are merged
// in order.
#include "softmax.hpp"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "pool.hpp"
#include "scratch.hpp"
#include "vec.hpp"

namespace respike {
using std::int64_t;
}

#define RESPIKE_PAIRS
#define RESPIKE_KERNELS "softmax_kernels.inc"
#include "each_level.hpp"

namespace respike {

template <class T, class E>
SoftmaxParts<T, E> softmax_parts([[maybe_unused]] Level level) {
#if RESPIKE_X86
  if constexpr (std::is_same_v<T, bf16>) {
    if (level >= Level::avx512bf16) return avx512bf16::parts<T, E>();
  }
  if (level >= Level::avx512) return avx512::parts<T, E>();
  if (level >= Level::avx2) return avx2::parts<T, E>();
#endif
  return portable::parts<T, E>();
}

void clear(SoftmaxTile& tile, float* state) {
  tile.top = state;
  tile.mass = state + (tile.rows + 15) / 16 * 16;
  tile.out = tile.mass + tile.rows * lanes_of_mass;
  std::fill(tile.top, tile.mass, minus_infinity);
  std::fill(tile.mass, state + state_floats(tile.rows, tile.value_dim), 0.0f);
}

namespace {

constexpr int64_t piece_keys = 1024;      // keys of a piece, or more if there are too many pieces
constexpr int64_t most_pieces = 64;       // of a job
constexpr int64_t serial_work = 1 << 18;  // products; fewer are not worth waking a thread

constexpr int64_t floats_of_line(int64_t floats) { return (floats + 15) / 16 * 16; }

// How a job is cut.
struct Cut {
  int64_t tokens;  // of a tile
  int64_t tiles;
  int64_t pieces;  // 1 unless there is one tile
  int64_t keys;    // of a piece
};

struct Unit {
  int64_t job, tile, piece;
  float* state;  // where the sums of a piece go; null: not in pieces
};

// Keys [from, to) are what tokens [first, last) see.
struct Stretch {
  int64_t from, to;
};

template <class T, class E>
Stretch stretch_of(const SoftmaxJob<T, E>& job, int64_t first, int64_t last) {
  const int64_t window = std::min(job.window, without_window);
  const int64_t to = std::clamp<int64_t>(job.start + last - job.first, 0, job.keys.count);
  return {std::clamp<int64_t>(job.start + first - window + 1 - job.first, 0, to), to};
}

template <class T, class E>
Cut cut_of(const SoftmaxJob<T, E>& job) {
  Cut cut{};
  const int64_t most = std::max<int64_t>(1, tile_rows / job.heads);
  cut.tiles = (job.tokens + most - 1) / most;
  if (cut.tiles == 0) return cut;
  cut.tokens = (job.tokens + cut.tiles - 1) / cut.tiles;
  const Stretch all = stretch_of(job, 0, job.tokens);
  const int64_t keys = all.to - all.from;
  cut.pieces = 1;
  if (cut.tiles == 1) cut.pieces = std::clamp<int64_t>(keys / piece_keys, 1, most_pieces);
  cut.keys = ((keys + cut.pieces - 1) / cut.pieces + block_keys - 1) / block_keys * block_keys;
  return cut;
}

template <class T, class E>
int64_t state_of(const SoftmaxJob<T, E>& job, const Cut& cut) {
  return floats_of_line(state_floats(cut.tokens * job.heads, job.value_dim));
}

// Scratch of one thread, in floats from its start.
struct Places {
  int64_t q_sink, keys, values, state, all;
};

template <class T, class E>
Places desk_of(const SoftmaxJob<T, E>& job, const Cut& cut) {
  Places desk;
  const int64_t q = floats_of_line(cut.tokens * job.heads * query_row(job.head_dim));
  desk.q_sink = q;
  desk.keys = 2 * q;
  desk.values = desk.keys + floats_of_line(key_panel(job.head_dim));
  desk.state = desk.values + value_panel(job.value_dim);
  desk.all = desk.state + state_of(job, cut);
  return desk;
}

template <class T, class E>
SoftmaxTile tile_of(const SoftmaxJob<T, E>& job, int64_t first, int64_t last) {
  SoftmaxTile tile{};
  tile.rows = (last - first) * job.heads;
  tile.heads = job.heads;
  tile.head_dim = job.head_dim;
  tile.value_dim = job.value_dim;
  tile.position = job.start + first;
  tile.factor = job.scale * log2_e;
  return tile;
}

// What follows the first `count` of `all` keys.
template <class E>
Wanted wanted_behind(const Keys<E>& keys, int64_t count, int64_t all, const SoftmaxTile& tile) {
  constexpr int64_t size = sizeof(E);
  Wanted wanted{};
  wanted.k = reinterpret_cast<const char*>(keys.k + count * keys.stride);
  wanted.v = reinterpret_cast<const char*>(keys.v + count * keys.value_stride());
  wanted.k_stride = keys.stride * size;
  wanted.v_stride = keys.value_stride() * size;
  wanted.k_bytes = tile.head_dim * size;
  wanted.v_bytes = tile.value_dim * size;
  wanted.count = std::min(block_keys, all - count);
  return wanted;
}

// Shows a tile keys [from, to) of a cache.
template <class T, class E>
void show(const SoftmaxParts<T, E>& parts, const SoftmaxTile& tile, const Keys<E>& keys,
          Stretch seen, KeyBlock block) {
  const int64_t position = block.first;
  for (int64_t at = seen.from; at < seen.to; at += block_keys) {
    block.count = std::min(block_keys, seen.to - at);
    block.first = position + at;
    alignas(64) float scales[2][block_keys];
    Keys<E> rest = keys;
    rest.k += at * keys.stride;
    rest.v += at * keys.value_stride();
    if constexpr (std::is_same_v<E, std::int8_t>) {
      std::fill(scales[0], scales[0] + 2 * block_keys, 0.0f);
      std::copy_n(keys.k_scale + at, block.count, scales[0]);
      std::copy_n(keys.v_scale + at, block.count, scales[1]);
      block.key_scales = scales[0];
      block.value_scales = scales[1];
    }
    block.wanted = wanted_behind(rest, block.count, seen.to - at, tile);
    parts.pack(rest, tile, block);
    parts.attend(tile, block, 0, tile.rows);
  }
}

template <class T, class E>
void run(const SoftmaxParts<T, E>& parts, const SoftmaxJob<T, E>& job, const Cut& cut,
         const Unit& unit, float* memory) {
  const Places desk = desk_of(job, cut);
  const int64_t first = unit.tile * cut.tokens;
  const int64_t last = std::min(job.tokens, first + cut.tokens);
  SoftmaxTile tile = tile_of(job, first, last);
  clear(tile, unit.state != nullptr ? unit.state : memory + desk.state);
  KeyBlock block{};
  block.keys = memory + desk.keys;
  block.values = memory + desk.values;
  parts.load_queries(job.q + first * job.q_stride, job.q_stride, last - first, tile, memory);
  const int64_t sinks = std::clamp<int64_t>(job.start + last, 0, job.sinks.count);
  if (sinks > 0 && unit.piece == 0) {
    tile.q = memory;
    if (job.q_sink != job.q) {
      parts.load_queries(job.q_sink + first * job.q_stride, job.q_stride, last - first, tile,
                         memory + desk.q_sink);
      tile.q = memory + desk.q_sink;
    }
    block.window = without_window;
    show(parts, tile, job.sinks, {0, sinks}, block);
  }
  tile.q = memory;
  block.first = job.first;
  block.window = std::min(job.window, without_window);
  Stretch seen = stretch_of(job, first, last);
  if (cut.pieces > 1) {
    seen.from += unit.piece * cut.keys;
    seen.to = std::min(seen.to, seen.from + cut.keys);
  }
  show(parts, tile, job.keys, seen, block);
  if (unit.state != nullptr) return;
  parts.finish(tile, job.out + first * job.out_stride, job.out_stride,
               job.log_mass == nullptr ? nullptr : job.log_mass + first * job.mass_stride,
               job.mass_stride);
}

// Outputs of a job in pieces; the state of piece i is at states + i * state_of().
template <class T, class E>
void join(const SoftmaxParts<T, E>& parts, const SoftmaxJob<T, E>& job, const Cut& cut,
          float* states) {
  SoftmaxTile tile = tile_of(job, 0, job.tokens);
  const auto at = [&](int64_t piece) {
    SoftmaxTile other = tile;
    other.top = states + piece * state_of(job, cut);
    other.mass = other.top + (tile.rows + 15) / 16 * 16;
    other.out = other.mass + tile.rows * lanes_of_mass;
    return other;
  };
  tile = at(0);
  for (int64_t piece = 1; piece < cut.pieces; ++piece) parts.merge(tile, at(piece));
  parts.finish(tile, job.out, job.out_stride, job.log_mass, job.mass_stride);
}

}  // namespace

template <class T, class E>
void softmax(Level level, int threads, const SoftmaxJob<T, E>* jobs, int64_t count) {
  thread_local std::vector<float> desks, states;
  thread_local std::vector<Cut> cuts;
  thread_local std::vector<Unit> units;
  const SoftmaxParts<T, E> parts = softmax_parts<T, E>(level);
  int64_t desk = 0, state = 0, work = 0;
  cuts.clear();
  for (int64_t j = 0; j < count; ++j) {
    const Cut cut = cut_of(jobs[j]);
    cuts.push_back(cut);
    if (cut.tiles == 0) continue;
    desk = std::max(desk, desk_of(jobs[j], cut).all);
    if (cut.pieces > 1) state += cut.pieces * state_of(jobs[j], cut);
    const Stretch seen = stretch_of(jobs[j], 0, jobs[j].tokens);
    work += jobs[j].heads * (seen.to - seen.from) * (jobs[j].head_dim + jobs[j].value_dim);
  }
  threads = work < serial_work ? 1 : std::clamp(threads, 1, max_threads);
  float* memory = kept(desks, desk * threads);
  float* sums = kept(states, state);
  units.clear();
  for (int64_t j = 0; j < count; ++j) {
    // The last tiles of a causal job take longest: they go first.
    for (int64_t tile = cuts[j].tiles; tile-- > 0;) {
      for (int64_t piece = 0; piece < cuts[j].pieces; ++piece) {
        const bool alone = cuts[j].pieces == 1;
        units.push_back({j, tile, piece, alone ? nullptr : sums});
        if (!alone) sums += state_of(jobs[j], cuts[j]);
      }
    }
  }
  const std::vector<Cut>& cut = cuts;  // what tasks name is the caller's, not their own thread's
  const std::vector<Unit>& unit = units;
  parallel_for(threads, static_cast<int64_t>(unit.size()), [&](int64_t index, int slot) {
    const Unit& todo = unit[index];
    run(parts, jobs[todo.job], cut[todo.job], todo, memory + slot * desk);
  });
  for (const Unit& done : unit) {
    if (done.state != nullptr && done.piece == 0) {
      join(parts, jobs[done.job], cut[done.job], done.state);
    }
  }
}

#define RESPIKE_FOR(T, E)                                      \
  template SoftmaxParts<T, E> softmax_parts(Level);            \
  template void softmax(Level, int, const SoftmaxJob<T, E>*, int64_t);
RESPIKE_FOR(float, float)
RESPIKE_FOR(bf16, bf16)
RESPIKE_FOR(float, std::int8_t)
RESPIKE_FOR(bf16, std::int8_t)
#undef RESPIKE_FOR

}  // namespace respike
