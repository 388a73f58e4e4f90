// Attention to kept tokens and its gradients, see kept_attention.hpp.
//
// Tokens are worked through in tiles that are shown one list of columns. As in
// softmax_gradient.cpp, a job's gradients are made of pieces with sums of their own for keys.
#include "kept_attention.hpp"

#include <cmath>
#include <type_traits>
#include <vector>

#include "keep_columns.hpp"
#include "pool.hpp"
#include "softmax_gradient.hpp"
#include "vec.hpp"

namespace respike {
using std::int64_t;

namespace {

constexpr int64_t wanted_pieces = 12;   // of all jobs
constexpr int64_t piece_tokens = 1024;  // at least: sums of a piece are for all candidates

// Tokens [first, last) of a job.
struct KeptPiece {
  int64_t job, first, last;
  float *d_k, *d_v;  // (places + tokens, dim), of gradients
};

// What tokens [first, last), of the same `every` steps, see; returns how many columns.
template <class T>
int64_t find_columns(const KeptAttentionJob<T>& job, int64_t first, int64_t last,
                     Column<T>* columns) {
  const int64_t list = first / job.every;
  int64_t count = 0;
  const auto see = [&](int64_t candidate, int64_t from) {
    const int64_t until = std::min(job.until[candidate], last);
    from = std::max(from, first);
    if (from >= until) return;
    columns[count++] = {job.k + candidate * job.dim, job.v + candidate * job.dim, from, until};
  };
  for (int64_t m = 0; m < job.places; ++m) {
    const int64_t candidate = job.held[list * job.places + m];
    if (candidate >= 0) see(candidate, first);
  }
  for (int64_t t = list * job.every; t < last; ++t) see(job.places + t, t);
  return count;
}

// The first token that sees a column: all later ones do, as places do not become empty.
template <class T>
int64_t first_seeing(const Column<T>* columns, int64_t count, int64_t last) {
  for (int64_t c = 0; c < count; ++c) last = std::min(last, columns[c].from);
  return last;
}

// Calls tile(first, last) for tokens [first, last) of a job, cut where lists change.
template <class T, class F>
void each_tile(const KeptAttentionJob<T>& job, int64_t first, int64_t last, const F& tile) {
  const int64_t most = tile_tokens(job.heads, job.every);
  while (first < last) {
    const int64_t list_end = (first / job.every + 1) * job.every;
    const int64_t end = std::min({last, list_end, first + most});
    tile(first, end);
    first = end;
  }
}

// What a piece of gradients works with, for the queries of one tile.
template <class T>
struct KeptDesk {
  GradientDesk<T> step;
  std::vector<GradientDesk<T>> rows;  // the same for each 64 rows, with queries of their own
  float *mass, *delta, *d_q;
  float* sums;  // (64, dim)
  T *k, *v;     // (64, dim)
  Column<T>* columns;
};

template <class T>
KeptDesk<T> kept_desk(const KeptAttentionJob<T>& job, Desk& memory) {
  const int64_t most = tile_tokens(job.heads, job.every), rows = most * job.heads, dim = job.dim;
  KeptDesk<T> desk{};
  desk.step = gradient_desk<T>(dim, dim, memory);
  for (int64_t row = 0; row < rows; row += block_keys) {
    GradientDesk<T> own = desk.step;
    own.q = memory.take<float>(value_panel(dim));
    own.q_turned = memory.take<float>(key_panel(dim));
    own.d_out = memory.take<float>(value_panel(dim));
    own.d_out_turned = memory.take<float>(key_panel(dim));
    own.mass = memory.take<float>(block_keys);
    own.delta = memory.take<float>(block_keys);
    desk.rows.push_back(own);
  }
  desk.mass = memory.take<float>(rows);
  desk.delta = memory.take<float>(rows);
  desk.d_q = memory.take<float>(rows * value_tiles(dim) * tile_width);
  desk.sums = memory.take<float>(block_keys * dim);
  desk.k = memory.take<T>(block_keys * dim);
  desk.v = memory.take<T>(block_keys * dim);
  desk.columns = memory.take<Column<T>>(job.places + job.every);
  return desk;
}

template <class T>
struct KeptGradientParts {
  void (*run)(const KeptGradientJob<T>& job, const KeptPiece& piece, float* memory);
  void (*store)(const float* from, int64_t size, float scale, T* to);
};

}  // namespace
}  // namespace respike

#define RESPIKE_PAIRS
#define RESPIKE_KERNELS "kept_attention_kernels.inc"
#include "each_level.hpp"

namespace respike {
namespace {

#include "level_parts.inc"

// Attends tiles of one job after the other.
template <class T>
class Attention {
 public:
  Attention(Level level, const KeptAttentionJob<T>& job, float* memory)
      : job_(job), desk_(memory),
        tile_(level, {job.q, job.q_stride, job.heads, job.dim, job.scale},
              tile_tokens(job.heads, job.every), desk_) {
    columns_ = desk_.template take<Column<T>>(job.places + job.every);
  }

  int64_t floats() const { return desk_.used(); }

  void run(int64_t first, int64_t last) {
    const int64_t count = find_columns(job_, first, last, columns_);
    const int64_t seeing = first_seeing(columns_, count, last);
    for (int64_t t = first; t < seeing; ++t) {
      std::fill_n(job_.mean + t * job_.q_stride, job_.heads * job_.dim, 0.0f);
      std::fill_n(job_.log_mass + t * job_.mass_stride, job_.heads, minus_infinity);
    }
    if (seeing == last) return;
    whole_first(columns_, count, seeing, last);
    tile_.attend(columns_, count, seeing, last, job_.mean + seeing * job_.q_stride, job_.q_stride,
                 job_.log_mass + seeing * job_.mass_stride, job_.mass_stride);
  }

 private:
  const KeptAttentionJob<T>& job_;
  Desk desk_;
  ColumnTile<T> tile_;
  Column<T>* columns_;
};

template <class T>
std::vector<KeptPiece> cut(const KeptGradientJob<T>* jobs, int64_t count) {
  std::vector<KeptPiece> pieces;
  for (int64_t j = 0; j < count; ++j) {
    const KeptAttentionJob<T>& f = jobs[j].forward;
    const int64_t most = std::max<int64_t>(1, f.tokens / piece_tokens);
    const int64_t number = std::clamp<int64_t>(wanted_pieces / count, 1, most);
    const int64_t lists = (f.tokens + f.every - 1) / f.every;
    const int64_t each = (lists + number - 1) / number * f.every;
    for (int64_t first = 0; first < f.tokens; first += each) {
      pieces.push_back({j, first, std::min(f.tokens, first + each), nullptr, nullptr});
    }
  }
  return pieces;
}

template <class T>
void take_sums(const KeptAttentionJob<T>& job, KeptPiece& piece, Desk& desk) {
  piece.d_k = desk.take<float>((job.places + job.tokens) * job.dim);
  piece.d_v = desk.take<float>((job.places + job.tokens) * job.dim);
}

// Adds up what the pieces of a job found, in order.
template <class T>
void join(const KeptGradientParts<T>& parts, const std::vector<KeptPiece>& pieces,
          const KeptGradientJob<T>* jobs, int64_t j, float* sum) {
  const KeptAttentionJob<T>& f = jobs[j].forward;
  for (const bool values : {false, true}) {
    T* to = values ? jobs[j].d_v : jobs[j].d_k;
    for (int64_t row = 0; row < f.places + f.tokens; ++row) {
      std::fill_n(sum, f.dim, 0.0f);
      for (const KeptPiece& piece : pieces) {
        if (piece.job != j) continue;
        const float* part = (values ? piece.d_v : piece.d_k) + row * f.dim;
        for (int64_t i = 0; i < f.dim; ++i) sum[i] += part[i];
      }
      parts.store(sum, f.dim, values ? 1.0f : f.scale, to + row * f.dim);
    }
  }
}

}  // namespace

template <class T>
void kept_attention(Level level, int threads, const KeptAttentionJob<T>* jobs, int64_t count) {
  thread_local std::vector<float> desks;
  struct Tile {
    int64_t job, first, last;
  };
  std::vector<Tile> tiles;
  int64_t desk = 0;
  for (int64_t j = 0; j < count; ++j) {
    desk = std::max(desk, Attention<T>(level, jobs[j], nullptr).floats());
    each_tile(jobs[j], 0, jobs[j].tokens,
              [&](int64_t first, int64_t last) { tiles.push_back({j, first, last}); });
  }
  threads = std::clamp(threads, 1, max_threads);
  float* memory = kept(desks, desk * threads);
  parallel_for(threads, static_cast<int64_t>(tiles.size()), [&](int64_t index, int slot) {
    const Tile& tile = tiles[static_cast<std::size_t>(index)];
    Attention<T>(level, jobs[tile.job], memory + slot * desk).run(tile.first, tile.last);
  });
}

template <class T>
void kept_gradient(Level level, int threads, const KeptGradientJob<T>* jobs, int64_t count) {
  thread_local std::vector<float> desks, sums;
  const KeptGradientParts<T> parts = parts_for<T>(level);
  std::vector<KeptPiece> pieces = cut(jobs, count);
  int64_t desk = 0;
  for (int64_t j = 0; j < count; ++j) {
    Desk one(nullptr);
    kept_desk(jobs[j].forward, one);
    desk = std::max(desk, one.used());
  }
  Desk measured(nullptr);
  for (KeptPiece& piece : pieces) take_sums(jobs[piece.job].forward, piece, measured);
  Desk cutter(kept(sums, measured.used()));
  for (KeptPiece& piece : pieces) take_sums(jobs[piece.job].forward, piece, cutter);
  threads = std::clamp(threads, 1, max_threads);
  float* memory = kept(desks, desk * threads);
  const auto size = static_cast<int64_t>(pieces.size());
  parallel_for(threads, size, [&](int64_t index, int slot) {
    const KeptPiece& piece = pieces[static_cast<std::size_t>(size - 1 - index)];
    parts.run(jobs[piece.job], piece, memory + slot * desk);
  });
  parallel_for(threads, count, [&](int64_t j, int slot) {
    join(parts, pieces, jobs, j, memory + slot * desk);
  });
}

template void kept_attention(Level, int, const KeptAttentionJob<float>*, int64_t);
template void kept_attention(Level, int, const KeptAttentionJob<bf16>*, int64_t);
template void kept_gradient(Level, int, const KeptGradientJob<float>*, int64_t);
template void kept_gradient(Level, int, const KeptGradientJob<bf16>*, int64_t);

}  // namespace respike
