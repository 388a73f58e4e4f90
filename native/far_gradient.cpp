// Gradients of the far memory, see far_gradient.hpp.
//
// A job goes through its chunks of 16 tokens twice. In order, as the forward pass does, with the
// memory before each chunk: what was read, and so the gradients of queries, of the window's average
// and of the chunk's own keys and values by its own queries. Backwards, with the gradient of the
// memory after each chunk: the rest of the gradients of keys and values. That of the decay is, at
// each step, the product of the memory before it and its gradient, of which only chunks' ends are
// multiplied out: within a chunk it grows by what is read and shrinks by what was written.
#include "far_gradient.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "far_chunk.hpp"
#include "pool.hpp"
#include "recurrent_chunk.hpp"
#include "scratch.hpp"
#include "vec.hpp"

namespace respike {
namespace {

// What the way back needs of a chunk; everything padded as in Chunk.
struct FarChunk {
  float *before, *mass_before;     // the memory before it: (keys, values), (keys)
  float *d_read, *d_mass;          // (heads, 16, values), (heads, 16): of reads, before division
  float *features, *d_features;    // (16, keys): of keys
  float *v, *d_v;                  // (16, values)
  float* q_turned;                 // (heads, keys, 16): features of queries times c.since
  float *shared;                   // (16): sum over heads of the gradients of shares' logits
  float *left, *total;             // (16), (1): what is left at the end: of each token, of before
};

// Gradients that all chunks add to.
struct FarSums {
  float *query_weight, *beta;      // (heads, keys, inputs), (heads)
  float *key_weight, *key_bias;    // (keys, inputs), (keys)
  double* log_decay;
  float *state, *mass;             // of the memory: (keys, values), (keys)
};

struct FarDesk {
  float *v_turned, *state_turned;      // (values, 16), (values, keys)
  float *d_weights, *d_features;       // (16, 16), (16, keys)
  float *rows, *turned;                // (16, inputs), (keys, 16)
  float *query_weight, *key_weight;    // (heads, keys, inputs), (keys, inputs)
};

FarChunk cut_far_chunk(const Shape& s, Cutter& cutter) {
  FarChunk f{};
  f.before = cutter.floats(s.keys * s.values);
  f.mass_before = cutter.floats(s.keys);
  f.d_read = cutter.floats(s.heads * chunk_tokens * s.values);
  f.d_mass = cutter.floats(s.heads * chunk_tokens);
  f.features = cutter.floats(chunk_tokens * s.keys);
  f.d_features = cutter.floats(chunk_tokens * s.keys);
  f.v = cutter.floats(chunk_tokens * s.values);
  f.d_v = cutter.floats(chunk_tokens * s.values);
  f.q_turned = cutter.floats(s.heads * s.keys * chunk_tokens);
  f.shared = cutter.floats(chunk_tokens);
  f.left = cutter.floats(chunk_tokens);
  f.total = cutter.floats(1);
  return f;
}

FarSums cut_sums(const Shape& s, Cutter& cutter) {
  FarSums sums{};
  sums.query_weight = cutter.floats(s.heads * s.keys * s.inputs);
  sums.beta = cutter.floats(s.heads);
  sums.key_weight = cutter.floats(s.keys * s.inputs);
  sums.key_bias = cutter.floats(s.keys);
  sums.state = cutter.floats(s.keys * s.values);
  sums.mass = cutter.floats(s.keys);
  return sums;
}

FarDesk cut_desk(const Shape& s, Cutter& cutter) {
  FarDesk desk{};
  desk.v_turned = cutter.floats(s.values * chunk_tokens);
  desk.state_turned = cutter.floats(s.values * s.keys);
  desk.d_weights = cutter.floats(chunk_tokens * chunk_tokens);
  desk.d_features = cutter.floats(chunk_tokens * s.keys);
  desk.rows = cutter.floats(chunk_tokens * s.inputs);
  desk.turned = cutter.floats(s.keys * chunk_tokens);
  desk.query_weight = cutter.floats(s.heads * s.keys * s.inputs);
  desk.key_weight = cutter.floats(s.keys * s.inputs);
  return desk;
}

int64_t chunks_of(int64_t tokens) { return (tokens + chunk_tokens - 1) / chunk_tokens; }

}  // namespace
}  // namespace respike

#define RESPIKE_KERNELS "recurrent_rows.inc"
#include "each_level.hpp"
#define RESPIKE_KERNELS "recurrent_kernels.inc"
#include "each_level.hpp"
#define RESPIKE_KERNELS "recurrent_jobs.inc"
#include "each_level.hpp"
#define RESPIKE_KERNELS "far_gradient_kernels.inc"
#include "each_level.hpp"

namespace respike {
namespace {

template <class T>
struct FarGradientKernels {
  void (*forth)(const FarGradientJob<T>&, int64_t first, const Shape&, const Sequence&, Chunk,
                const FarChunk&, const FarSums&, const FarDesk&);
  void (*back)(const FarGradientJob<T>&, int64_t first, int64_t tokens, const Shape&,
               const FarChunk&, const FarChunk* after, const FarSums&, const FarDesk&);
};

template <class T>
FarGradientKernels<T> gradient_kernels([[maybe_unused]] Level level) {
#if RESPIKE_X86
  if (level >= Level::avx512) return {avx512::forth<T>, avx512::back<T>};
  if (level >= Level::avx2) return {avx2::forth<T>, avx2::back<T>};
#endif
  return {portable::forth<T>, portable::back<T>};
}

// Everything a job works with.
struct Workplace {
  Sequence all;
  Chunk chunk;
  FarSums sums;
  FarDesk desk;
  std::vector<FarChunk> chunks;

  Workplace(const Shape& s, int64_t count, Cutter& cutter) {
    all = cut_sequence(s, cutter);
    chunk = cut_chunk(s, cutter);
    sums = cut_sums(s, cutter);
    desk = cut_desk(s, cutter);
    for (int64_t i = 0; i < count; ++i) chunks.push_back(cut_far_chunk(s, cutter));
  }
};

// (heads, F, K) padded with zeros, and back again.
void pad_weights(const float* weight, int64_t heads, int64_t features, int64_t key_dim,
                 const Shape& s, float* to) {
  std::fill_n(to, heads * s.keys * s.inputs, 0.0f);
  for (int64_t h = 0; h < heads; ++h) {
    copy_matrix(weight + h * features * key_dim, key_dim, features, key_dim,
                to + h * s.keys * s.inputs, s.inputs);
  }
}
void take_weights(const float* padded, int64_t heads, int64_t features, int64_t key_dim,
                  const Shape& s, float* weight) {
  for (int64_t h = 0; h < heads; ++h) {
    copy_matrix(padded + h * s.keys * s.inputs, s.inputs, features, key_dim,
                weight + h * features * key_dim, key_dim);
  }
}

template <class T>
void run(const FarGradientKernels<T>& kernels, const FarGradientJob<T>& job, float* memory,
         int64_t floats) {
  const FarJob<T>& f = job.forward;
  const Shape s = shape_of(f);
  const int64_t count = chunks_of(f.tokens);
  std::fill_n(memory, floats, 0.0f);
  Cutter cutter(memory);
  Workplace place(s, count, cutter);
  double log_decay = 0.0;
  place.sums.log_decay = &log_decay;
  open(f, s, place.all);
  pad_weights(f.query_weight, s.heads, f.features, f.key_dim, s, place.desk.query_weight);
  pad_weights(f.key_weight, 1, f.features, f.key_dim, s, place.desk.key_weight);
  for (int64_t i = 0; i < count; ++i) {
    place.chunk.tokens = std::min(chunk_tokens, f.tokens - i * chunk_tokens);
    kernels.forth(job, i * chunk_tokens, s, place.all, place.chunk, place.chunks[i], place.sums,
                  place.desk);
  }
  for (int64_t i = count; i-- > 0;) {
    const int64_t tokens = std::min(chunk_tokens, f.tokens - i * chunk_tokens);
    const FarChunk* after = i + 1 < count ? &place.chunks[i + 1] : nullptr;
    kernels.back(job, i * chunk_tokens, tokens, s, place.chunks[i], after, place.sums, place.desk);
  }
  take_weights(place.sums.query_weight, s.heads, f.features, f.key_dim, s, job.d_query_weight);
  take_weights(place.sums.key_weight, 1, f.features, f.key_dim, s, job.d_key_weight);
  std::copy_n(place.sums.key_bias, f.features, job.d_key_bias);
  std::copy_n(place.sums.beta, s.heads, job.d_beta);
  *job.d_log_decay = static_cast<float>(log_decay);
}

}  // namespace

template <class T>
void far_gradient(Level level, int threads, const FarGradientJob<T>* jobs, int64_t count) {
  thread_local std::vector<float> scratch;
  int64_t floats = 0;
  for (int64_t j = 0; j < count; ++j) {
    Cutter cutter(nullptr);
    Workplace(shape_of(jobs[j].forward), chunks_of(jobs[j].forward.tokens), cutter);
    floats = std::max(floats, cutter.used());
  }
  threads = static_cast<int>(std::clamp<int64_t>(std::min<int64_t>(threads, count), 1, max_threads));
  float* memory = kept(scratch, floats * threads);
  const FarGradientKernels<T> kernels = gradient_kernels<T>(level);
  parallel_for(threads, count, [&](int64_t index, int slot) {
    run(kernels, jobs[index], memory + slot * floats, floats);
  });
}

template void far_gradient(Level, int, const FarGradientJob<float>*, int64_t);
template void far_gradient(Level, int, const FarGradientJob<bf16>*, int64_t);

}  // namespace respike
