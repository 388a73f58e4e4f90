// Linear memories, see recurrent.hpp. In chunks of 16 tokens, each by the same kernels in the same
// order whoever runs them, so that bits do not depend on the number of threads:
//   prepare  what does not depend on the state: features, decays, weights of values in outputs
//   solve    the delta rule's changes, and `update`, the state: in order, but column by column
//   finish   outputs, from the state before the chunk
// Jobs enough for all threads are done each by one, chunk by chunk. Fewer are done together, a
// stretch of chunks at a time: `prepare` and `finish` by chunks, `solve` and `update` by columns.
#include "recurrent.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "far_chunk.hpp"
#include "pool.hpp"
#include "recurrent_chunk.hpp"
#include "vec.hpp"

namespace respike {
using std::int64_t;
}

#define RESPIKE_KERNELS "recurrent_rows.inc"
#include "each_level.hpp"
#define RESPIKE_KERNELS "recurrent_kernels.inc"
#include "each_level.hpp"
#define RESPIKE_KERNELS "recurrent_jobs.inc"
#include "each_level.hpp"
#define RESPIKE_KERNELS "recurrent_steps.inc"
#include "each_level.hpp"

namespace respike {
namespace {

constexpr int64_t stretch_chunks = 12;    // for each thread: their working memory fits its cache
constexpr int64_t strip_columns = 16;     // of a state: the least that a task takes
constexpr int64_t serial_work = 1 << 17;  // products; fewer are not worth waking a thread

template <class Job>
struct Kernels {
  void (*prepare)(const Job&, int64_t first, const Shape&, const Sequence&, const Chunk&);
  void (*solve)(const Shape&, const Chunk&, const float* state, int64_t from, int64_t to);
  void (*update)(const Shape&, const Chunk&, float* state, int64_t from, int64_t to);
  void (*update_mass)(const Shape&, const Chunk&, float* mass);
  void (*finish)(const Job&, int64_t first, const Shape&, const Chunk&);
  void (*step)(const Job&, float* buffer);
};

template <class Job>
Kernels<Job> kernels_for([[maybe_unused]] Level level) {
#if RESPIKE_X86
  if (level >= Level::avx512) {
    return {avx512::prepare, avx512::solve,  avx512::update, avx512::update_mass,
            avx512::finish,  avx512::step};
  }
  if (level >= Level::avx2) {
    return {avx2::prepare, avx2::solve,  avx2::update, avx2::update_mass,
            avx2::finish,  avx2::step};
  }
#endif
  return {portable::prepare, portable::solve,  portable::update, portable::update_mass,
          portable::finish,  portable::step};
}

// ---- what differs between the jobs

template <class Job>
Shape shape_of(const Job& job) {
  const int64_t keys = padded(job.key_dim);
  return {job.heads, keys, keys, padded(job.value_dim), false, false};
}
template <class T>
Shape shape_of(const DeltaJob<T>& job) {
  const int64_t keys = padded(job.key_dim);
  return {job.heads, keys, keys, padded(job.value_dim), true, false};
}
template <class Job>
void open(const Job& job, const Shape& s, const Sequence& all) {
  std::fill_n(all.state, s.keys * s.values, 0.0f);
  copy_matrix(job.state, job.value_dim, job.key_dim, job.value_dim, all.state, s.values);
}
template <class Job>
void close(const Job& job, const Shape& s, const Sequence& all) {
  copy_matrix(all.state, s.values, job.key_dim, job.value_dim, job.state, job.value_dim);
}

template <class T>
void close(const FarJob<T>& job, const Shape& s, const Sequence& all) {
  const int64_t F = job.features, columns = job.value_dim + 1;
  copy_matrix(all.state, s.values, F, job.value_dim, job.memory, columns);
  copy_matrix(all.mass, 1, F, 1, job.memory + job.value_dim, columns);
}

// Floats a step needs at most.
int64_t step_floats(const Shape& s) {
  const int64_t rows = s.heads + 1, columns = s.values + chunk_tokens;
  return rows * (s.keys + columns) + 4 * s.keys + s.inputs + columns + 8 * chunk_tokens;
}

// ---- chunks

template <class Job>
class Run {
 public:
  Run(Level level, int threads, const Job* jobs, int64_t count)
      : kernels_(kernels_for<Job>(level)), threads_(threads), jobs_(jobs), count_(count) {}

  void all();

 private:
  static Cutter measured(const Shape& s) {
    Cutter cutter(nullptr);
    cut_sequence(s, cutter);
    return cutter;
  }
  static int64_t sequence_floats(const Shape& s) { return measured(s).used(); }
  static int64_t chunk_floats(const Shape& s) {
    Cutter cutter(nullptr);
    cut_chunk(s, cutter);
    cutter.floats(s.keys * s.values + s.keys);  // the state before the chunk
    return cutter.used();
  }

  void each_alone(float* memory, int64_t each);
  void whole(const Job& job, float* memory) const;
  void together(float* memory, int64_t each_sequence, int64_t each_chunk, int64_t stretch);
  void states_of(const Job& job, const Shape& s, const Sequence& all, float* chunks,
                 int64_t each_chunk, int64_t first, int64_t stretch, int64_t column) const;
  Chunk chunk_at(const Job& job, const Shape& s, int64_t first, float* memory) const;

  Kernels<Job> kernels_;
  int threads_;
  const Job* jobs_;
  int64_t count_;
};

// float32 scratch that starts on a cache line; kept, because the next call needs it again.
float* scratch(int64_t elements) {
  thread_local std::vector<float> kept;
  const auto size = static_cast<std::size_t>(elements) + 16;
  if (kept.size() < size) kept.resize(size);
  const auto address = reinterpret_cast<std::uintptr_t>(kept.data());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

template <class Job>
void Run<Job>::all() {
  int64_t each_sequence = 0, each_chunk = 0, each_step = 0, work = 0, longest = 0;
  for (const Job* job = jobs_; job != jobs_ + count_; ++job) {
    const Shape s = shape_of(*job);
    each_step = std::max(each_step, padded(step_floats(s)));
    each_sequence = std::max(each_sequence, sequence_floats(s));
    each_chunk = std::max(each_chunk, chunk_floats(s));
    work += job->tokens * (s.heads + 1) * s.keys * (s.values + (s.far ? s.inputs : 0));
    longest = std::max(longest, job->tokens);
  }
  threads_ = work < serial_work ? 1 : std::clamp(threads_, 1, max_threads);
  if (longest <= 1 || threads_ == 1 || count_ >= 4 * threads_ || count_ % threads_ == 0) {
    const int64_t each = std::max(each_step, longest <= 1 ? 0 : each_sequence + each_chunk);
    each_alone(scratch(each * threads_), each);
    return;
  }
  const int64_t stretch = std::max<int64_t>(1, threads_ * stretch_chunks / count_);
  const int64_t floats = count_ * (each_sequence + stretch * each_chunk);
  together(scratch(std::max(floats, each_step)), each_sequence, each_chunk, stretch);
}

template <class Job>
void Run<Job>::each_alone(float* memory, int64_t each) {
  parallel_for(threads_, count_, [&](int64_t index, int slot) {
    float* mine = memory + slot * each;
    if (jobs_[index].tokens == 1) return kernels_.step(jobs_[index], mine);
    if (jobs_[index].tokens > 1) whole(jobs_[index], mine);
  });
}

template <class Job>
Chunk Run<Job>::chunk_at(const Job& job, const Shape& s, int64_t first, float* memory) const {
  Cutter cutter(memory);
  Chunk c = cut_chunk(s, cutter);
  c.tokens = std::min(chunk_tokens, job.tokens - first);
  return c;
}

// One job, chunk after chunk.
template <class Job>
void Run<Job>::whole(const Job& job, float* memory) const {
  const Shape s = shape_of(job);
  Cutter cutter(memory);
  const Sequence all = cut_sequence(s, cutter);
  open(job, s, all);
  for (int64_t first = 0; first < job.tokens; first += chunk_tokens) {
    Chunk c = chunk_at(job, s, first, memory + cutter.used());
    c.before = all.state;
    c.mass = all.mass;
    kernels_.prepare(job, first, s, all, c);
    if (s.delta) kernels_.solve(s, c, all.state, 0, s.values);
    kernels_.finish(job, first, s, c);
    kernels_.update(s, c, all.state, 0, s.values);
    if (s.far) kernels_.update_mass(s, c, all.mass);
  }
  close(job, s, all);
}

// A strip of the state through a stretch of chunks, which get a copy of it from before.
template <class Job>
void Run<Job>::states_of(const Job& job, const Shape& s, const Sequence& all, float* chunks,
                         int64_t each_chunk, int64_t first, int64_t stretch,
                         int64_t column) const {
  const int64_t end = std::min(job.tokens, first + stretch * chunk_tokens);
  for (; first < end; first += chunk_tokens, chunks += each_chunk) {
    const Chunk c = chunk_at(job, s, first, chunks);
    float* before = chunks + each_chunk - s.keys * s.values - s.keys;
    copy_matrix(all.state + column, s.values, s.keys, strip_columns, before + column, s.values);
    if (s.delta) kernels_.solve(s, c, all.state, column, column + strip_columns);
    kernels_.update(s, c, all.state, column, column + strip_columns);
    if (s.far && column == 0) {
      std::copy_n(all.mass, s.keys, before + s.keys * s.values);
      kernels_.update_mass(s, c, all.mass);
    }
  }
}

template <class Job>
void Run<Job>::together(float* memory, int64_t each_sequence, int64_t each_chunk,
                        int64_t stretch) {
  int64_t longest = 0, strips = 0;
  for (int64_t index = 0; index < count_; ++index) {
    const Job& job = jobs_[index];
    if (job.tokens == 1) kernels_.step(job, memory);
    if (job.tokens <= 1) continue;
    longest = std::max(longest, job.tokens);
    strips = std::max(strips, padded(job.value_dim) / strip_columns);
  }
  float* chunks = memory + count_ * each_sequence;
  const auto sequence_at = [&](int64_t index, const Shape& s) {
    Cutter cutter(memory + index * each_sequence);
    return cut_sequence(s, cutter);
  };
  parallel_for(threads_, count_, [&](int64_t index, int) {
    const Shape s = shape_of(jobs_[index]);
    if (jobs_[index].tokens > 1) open(jobs_[index], s, sequence_at(index, s));
  });
  // do(job, shape, index, chunk's number, token) for every chunk of the stretch.
  const auto each_chunk_of = [&](int64_t start, const auto& work) {
    parallel_for(threads_, count_ * stretch, [&](int64_t task, int) {
      const Job& job = jobs_[task / stretch];
      const int64_t first = start + task % stretch * chunk_tokens;
      if (job.tokens > 1 && first < job.tokens) {
        work(job, shape_of(job), task / stretch, chunks + task * each_chunk, first);
      }
    });
  };
  for (int64_t start = 0; start < longest; start += stretch * chunk_tokens) {
    each_chunk_of(start, [&](const Job& job, const Shape& s, int64_t index, float* mine,
                             int64_t first) {
      kernels_.prepare(job, first, s, sequence_at(index, s), chunk_at(job, s, first, mine));
    });
    parallel_for(threads_, count_ * strips, [&](int64_t task, int) {
      const int64_t index = task / strips, column = task % strips * strip_columns;
      const Job& job = jobs_[index];
      const Shape s = shape_of(job);
      if (job.tokens <= 1 || column >= s.values) return;
      states_of(job, s, sequence_at(index, s), chunks + index * stretch * each_chunk, each_chunk,
                start, stretch, column);
    });
    each_chunk_of(start, [&](const Job& job, const Shape& s, int64_t, float* mine, int64_t first) {
      Chunk c = chunk_at(job, s, first, mine);
      c.before = mine + each_chunk - s.keys * s.values - s.keys;
      c.mass = c.before + s.keys * s.values;
      kernels_.finish(job, first, s, c);
    });
  }
  for (int64_t index = 0; index < count_; ++index) {
    const Shape s = shape_of(jobs_[index]);
    if (jobs_[index].tokens > 1) close(jobs_[index], s, sequence_at(index, s));
  }
}

}  // namespace

template <class T>
void gla(Level level, int threads, const GlaJob<T>* jobs, int64_t count) {
  Run<GlaJob<T>>(level, threads, jobs, count).all();
}
template <class T>
void delta(Level level, int threads, const DeltaJob<T>* jobs, int64_t count) {
  Run<DeltaJob<T>>(level, threads, jobs, count).all();
}
template <class T>
void far(Level level, int threads, const FarJob<T>* jobs, int64_t count) {
  Run<FarJob<T>>(level, threads, jobs, count).all();
}

#define RESPIKE_FOR(T)                                          \
  template void gla(Level, int, const GlaJob<T>*, int64_t);     \
  template void delta(Level, int, const DeltaJob<T>*, int64_t); \
  template void far(Level, int, const FarJob<T>*, int64_t);
RESPIKE_FOR(float)
RESPIKE_FOR(bf16)
#undef RESPIKE_FOR

}  // namespace respike
