// Gradients of block-sparse softmax, see blocks_gradient.hpp.
//
// As in softmax_gradient.cpp, the queries of a job are cut into pieces, a piece goes through its
// keys, and for each 64 of them through the queries that see any of them. Some whole blocks are
// taken together, or a part of a long one. Queries and keys are rotated to their places in the
// sequence, or, what is seen at the reach, queries to the reach and keys not at all; their gradients
// are rotated back. What is rotated stays in float32 for the scores: rounded to bf16 (2 products of
// 10 cheaper) gradients were up to 0.7 % off.
#include "blocks_gradient.hpp"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "pool.hpp"
#include "scratch.hpp"
#include "softmax_gradient.hpp"
#include "vec.hpp"

namespace respike {
using std::int64_t;

namespace {

constexpr int64_t wanted_pieces = 12;  // of all jobs
constexpr int64_t piece_tokens = 256;  // at least
constexpr int ways = 3;

// How a query sees a block: both at their places, or at the reach of chosen blocks, or of sinks.
enum Way { placed, still, sink, unseen };

struct BlocksPiece {
  int64_t job, first, last;
  int64_t slots;      // that its queries can see, from the first on
  float *d_k, *d_v;   // (slots, ..): what it adds to the gradients of keys
};

// How a token at `position` sees block b.
inline Way way_of(const BlockRule& rule, const std::uint64_t* chosen, int64_t position, int64_t b) {
  const int64_t near = rule.first_near(position), sinks = rule.sink_blocks();
  if (b >= near) return b * rule.block <= position ? placed : unseen;
  const bool is_sink = b < sinks;
  const bool beyond = b < (is_sink ? BlockRule::beyond(position, rule.sink_reach, rule.block)
                                   : rule.held(position));
  if (is_sink) return beyond ? sink : placed;
  const bool all = near - sinks <= rule.top;
  if (!all && (chosen[b / 64] >> (b % 64) & 1) == 0) return unseen;
  return beyond ? still : placed;
}

// What a piece works with.
template <class T>
struct BlocksDesk {
  GradientDesk<T> step;
  float *mass, *delta;      // (rows)
  float* q[ways];           // (rows, head_dim): rotated
  float* d_q[ways];         // (rows, 64 * value_tiles(head_dim))
  float* keys;              // (64, head_dim)
  float *row, *back;        // (head_dim) each
  float *angles, *turns;    // (head_dim): of a token, and of its block
};

template <class T>
BlocksDesk<T> blocks_desk(const BlocksJob<T>& job, const BlocksPiece& piece, Desk& memory) {
  const int64_t rows = (piece.last - piece.first) * job.heads, K = job.head_dim;
  BlocksDesk<T> desk{};
  desk.step = gradient_desk<T>(K, job.value_dim, memory);
  desk.mass = memory.take<float>(rows);
  desk.delta = memory.take<float>(rows);
  for (int way = 0; way < ways; ++way) {
    desk.q[way] = memory.take<float>(rows * K);
    desk.d_q[way] = memory.take<float>(rows * value_tiles(K) * tile_width);
  }
  desk.keys = memory.take<float>(block_keys * K);
  for (float** line : {&desk.row, &desk.back, &desk.angles, &desk.turns}) {
    *line = memory.take<float>(2 * K);
  }
  return desk;
}

template <class T>
struct BlocksGradientParts {
  void (*run)(const BlocksGradientJob<T>&, const BlockRule&, const BlockTurns&,
              const BlocksPiece&, float* memory);
  void (*store)(const float* from, int64_t size, float scale, T* to);
};

// The angle of a position, from that of its block and that within it.
inline BlockTurns::Row angle_at(const BlockTurns& turns, const BlockRule& rule, int64_t position,
                                float* scratch, float* angle) {
  const int64_t half = turns.half();
  const BlockTurns::Row a = turns.blocks(position / rule.block, scratch);
  const BlockTurns::Row b = turns.tokens(position % rule.block);
  for (int64_t i = 0; i < half; ++i) {
    angle[i] = a.cos[i] * b.cos[i] - a.sin[i] * b.sin[i];
    angle[half + i] = a.sin[i] * b.cos[i] + a.cos[i] * b.sin[i];
  }
  return {angle, angle + half};
}

// The other way round.
inline BlockTurns::Row back_from(BlockTurns::Row angle, int64_t half, float* scratch) {
  std::copy_n(angle.cos, half, scratch);
  for (int64_t i = 0; i < half; ++i) scratch[half + i] = -angle.sin[i];
  return {scratch, scratch + half};
}

}  // namespace
}  // namespace respike

#define RESPIKE_PAIRS
#define RESPIKE_KERNELS "blocks_gradient_kernels.inc"
#include "each_level.hpp"

namespace respike {
namespace {

#include "level_parts.inc"

template <class T>
std::vector<BlocksPiece> cut(const BlocksGradientJob<T>* jobs, int64_t count) {
  std::vector<BlocksPiece> pieces;
  for (int64_t j = 0; j < count; ++j) {
    const BlocksJob<T>& f = jobs[j].forward;
    const int64_t most = std::max<int64_t>(1, f.tokens / piece_tokens);
    const int64_t number = std::clamp<int64_t>(wanted_pieces / count, 1, most);
    const int64_t each = (f.tokens + number - 1) / number;
    for (int64_t first = 0; first < f.tokens; first += each) {
      BlocksPiece piece{};
      piece.job = j;
      piece.first = first;
      piece.last = std::min(f.tokens, first + each);
      piece.slots = std::min(f.keys.count, f.start + piece.last);
      pieces.push_back(piece);
    }
  }
  return pieces;
}

// Adds up what the pieces found of rows of keys.
template <class T>
void join(const BlocksGradientParts<T>& parts, const std::vector<BlocksPiece>& pieces, int64_t job,
          bool values, int64_t rows, int64_t dim, float scale, float* sum, T* to) {
  for (int64_t row = 0; row < rows; ++row) {
    std::fill_n(sum, dim, 0.0f);
    for (const BlocksPiece& piece : pieces) {
      if (piece.job != job || row >= piece.slots) continue;
      const float* part = (values ? piece.d_v : piece.d_k) + row * dim;
      for (int64_t i = 0; i < dim; ++i) sum[i] += part[i];
    }
    parts.store(sum, dim, scale, to + row * dim);
  }
}

template <class T>
void take_sums(const BlocksJob<T>& job, BlocksPiece& piece, Desk& desk) {
  piece.d_k = desk.take<float>(piece.slots * job.head_dim);
  piece.d_v = desk.take<float>(piece.slots * job.value_dim);
}

}  // namespace

template <class T>
void blocks_gradient(Level level, int threads, const BlockRule& rule, const BlockTurns& turns,
                     const BlocksGradientJob<T>* jobs, int64_t count) {
  thread_local std::vector<float> desks, sums;
  const BlocksGradientParts<T> parts = parts_for<T>(level);
  std::vector<BlocksPiece> pieces = cut(jobs, count);
  Desk measured(nullptr);
  int64_t floats = 0;
  for (BlocksPiece& piece : pieces) {
    Desk one(nullptr);
    blocks_desk(jobs[piece.job].forward, piece, one);
    floats = std::max(floats, one.used());
    take_sums(jobs[piece.job].forward, piece, measured);
  }
  for (int64_t j = 0; j < count; ++j) {
    const BlocksJob<T>& f = jobs[j].forward;
    floats = std::max(floats, (std::max(f.head_dim, f.value_dim) + 15) / 16 * 16);
  }
  threads = std::clamp(threads, 1, max_threads);
  Desk cutter(kept(sums, measured.used()));
  for (BlocksPiece& piece : pieces) take_sums(jobs[piece.job].forward, piece, cutter);
  float* memory = kept(desks, floats * threads);
  const auto size = static_cast<int64_t>(pieces.size());
  parallel_for(threads, size, [&](int64_t index, int slot) {
    const BlocksPiece& piece = pieces[size - 1 - index];  // the last see most
    parts.run(jobs[piece.job], rule, turns, piece, memory + slot * floats);
  });
  parallel_for(threads, count, [&](int64_t j, int slot) {
    const BlocksJob<T>& f = jobs[j].forward;
    float* sum = memory + slot * floats;
    join(parts, pieces, j, false, f.keys.count, f.head_dim, f.scale, sum, jobs[j].d_k);
    join(parts, pieces, j, true, f.keys.count, f.value_dim, 1.0f, sum, jobs[j].d_v);
  });
}

template void blocks_gradient(Level, int, const BlockRule&, const BlockTurns&,
                              const BlocksGradientJob<float>*, int64_t);
template void blocks_gradient(Level, int, const BlockRule&, const BlockTurns&,
                              const BlocksGradientJob<bf16>*, int64_t);

}  // namespace respike
