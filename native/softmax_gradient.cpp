// Gradients of softmax attention, see softmax_gradient.hpp.
//
// The queries of a job are cut into pieces, each with sums of its own of the keys' gradients, which
// are added up in order at the end. A piece goes through its keys in blocks of 64, packed once, and
// through the queries that see a block 64 rows at a time (the heads of a group share keys): scores,
// weights and their gradients never leave the cache.
#include "softmax_gradient.hpp"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "pool.hpp"
#include "scratch.hpp"
#include "vec.hpp"

namespace respike {
using std::int64_t;

namespace {

constexpr int64_t wanted_pieces = 12;     // of all jobs
constexpr int64_t piece_tokens = 256;     // at least
constexpr int64_t serial_work = 1 << 16;  // products; fewer are not worth waking a thread

// Keys [from, to) of a cache whose first is at position `first`, and who sees them.
struct KeySpan {
  int64_t from, to, first, window;
};

// Tokens [first, last) of a job, and what they add to the gradients of their keys.
struct GradientPiece {
  int64_t job, first, last;
  KeySpan keys, sinks;
  float *d_k, *d_v, *d_sink_k, *d_sink_v;
};

// What a piece knows and finds of its queries.
struct PieceRows {
  float *mass, *delta, *d_q;
};

template <class T>
PieceRows piece_rows(const SoftmaxJob<T>& job, const GradientPiece& piece, Desk& desk) {
  const int64_t rows = (piece.last - piece.first) * job.heads;
  PieceRows mine{};
  mine.mass = desk.take<float>(rows);
  mine.delta = desk.take<float>(rows);
  mine.d_q = desk.take<float>(rows * value_tiles(job.head_dim) * tile_width);
  return mine;
}

template <class T>
struct GradientParts {
  void (*run)(const SoftmaxGradientJob<T>&, const GradientPiece&, float* memory);
  void (*join)(const GradientPiece*, int64_t count, bool values, bool sinks, int64_t rows,
               int64_t dim, float scale, float* sum, T* to);
};

}  // namespace
}  // namespace respike

#define RESPIKE_PAIRS
#define RESPIKE_KERNELS "softmax_gradient_kernels.inc"
#include "each_level.hpp"

namespace respike {
namespace {

#include "level_parts.inc"

template <class T>
GradientPiece piece_of(const SoftmaxJob<T>& job, int64_t index, int64_t first, int64_t last) {
  GradientPiece piece{};
  const int64_t window = std::min(job.window, without_window);
  piece.job = index;
  piece.first = first;
  piece.last = last;
  piece.keys.to = std::clamp<int64_t>(job.start + last - job.first, 0, job.keys.count);
  piece.keys.from =
      std::clamp<int64_t>(job.start + first - window + 1 - job.first, 0, piece.keys.to);
  piece.keys.first = job.first;
  piece.keys.window = window;
  piece.sinks = {0, std::clamp<int64_t>(job.start + last, 0, job.sinks.count), 0, without_window};
  return piece;
}

template <class T>
void take_sums(const SoftmaxJob<T>& job, GradientPiece& piece, Desk& desk) {
  const int64_t keys = piece.keys.to - piece.keys.from, sinks = piece.sinks.to;
  piece.d_k = desk.take<float>(keys * job.head_dim);
  piece.d_v = desk.take<float>(keys * job.value_dim);
  piece.d_sink_k = desk.take<float>(sinks * job.head_dim);
  piece.d_sink_v = desk.take<float>(sinks * job.value_dim);
}

template <class T>
std::vector<GradientPiece> cut(const SoftmaxGradientJob<T>* jobs, int64_t count) {
  std::vector<GradientPiece> pieces;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t tokens = jobs[j].forward.tokens;
    const int64_t most = std::max<int64_t>(1, tokens / piece_tokens);
    const int64_t number = std::clamp<int64_t>(wanted_pieces / count, 1, most);
    const int64_t each = (tokens + number - 1) / number;
    for (int64_t first = 0; first < tokens; first += each) {
      pieces.push_back(
          piece_of(jobs[j].forward, j, first, std::min(tokens, first + each)));
    }
  }
  return pieces;
}

template <class T>
void join_all(const GradientParts<T>& parts, const SoftmaxGradientJob<T>& job,
              const GradientPiece* pieces, int64_t count, float* sum) {
  const SoftmaxJob<T>& f = job.forward;
  parts.join(pieces, count, false, false, f.keys.count, f.head_dim, f.scale, sum, job.d_k);
  parts.join(pieces, count, true, false, f.keys.count, f.value_dim, 1.0f, sum, job.d_v);
  parts.join(pieces, count, false, true, f.sinks.count, f.head_dim, f.scale, sum, job.d_sink_k);
  parts.join(pieces, count, true, true, f.sinks.count, f.value_dim, 1.0f, sum, job.d_sink_v);
}

}  // namespace

template <class T>
void softmax_gradient(Level level, int threads, const SoftmaxGradientJob<T>* jobs,
                      int64_t count) {
  thread_local std::vector<float> desks, sums;
  const GradientParts<T> parts = parts_for<T>(level);
  std::vector<GradientPiece> pieces = cut(jobs, count);
  int64_t desk = 0, work = 0;
  Desk measured(nullptr);
  for (GradientPiece& piece : pieces) {
    const SoftmaxJob<T>& f = jobs[piece.job].forward;
    Desk one(nullptr);
    gradient_desk<T>(f.head_dim, f.value_dim, one);
    piece_rows(f, piece, one);
    desk = std::max(desk, one.used());
    take_sums(f, piece, measured);
    work += f.heads * (piece.last - piece.first) * (f.head_dim + f.value_dim);
  }
  for (int64_t j = 0; j < count; ++j) {
    desk = std::max({desk, jobs[j].forward.head_dim, jobs[j].forward.value_dim});
  }
  desk = (desk + 15) / 16 * 16;
  threads = work < serial_work ? 1 : std::clamp(threads, 1, max_threads);
  Desk cutter(kept(sums, measured.used()));
  for (GradientPiece& piece : pieces) take_sums(jobs[piece.job].forward, piece, cutter);
  float* memory = kept(desks, desk * threads);
  const auto size = static_cast<int64_t>(pieces.size());
  parallel_for(threads, size, [&](int64_t index, int slot) {
    const GradientPiece& piece = pieces[size - 1 - index];  // the last see most
    parts.run(jobs[piece.job], piece, memory + slot * desk);
  });
  parallel_for(threads, count, [&](int64_t j, int slot) {
    const auto of_job = [j](const GradientPiece& piece) { return piece.job >= j; };
    const auto* first = std::find_if(pieces.data(), pieces.data() + size, of_job);
    const auto* last = std::find_if(first, static_cast<const GradientPiece*>(pieces.data() + size),
                                    [j](const GradientPiece& piece) { return piece.job > j; });
    join_all(parts, jobs[j], first, last - first, memory + slot * desk);
  });
}

template void softmax_gradient(Level, int, const SoftmaxGradientJob<float>*, int64_t);
template void softmax_gradient(Level, int, const SoftmaxGradientJob<bf16>*, int64_t);

}  // namespace respike
