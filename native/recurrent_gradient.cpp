// Gradients of recurrent memories, see recurrent_gradient.hpp: token by token, as the definitions.
//
// Forwards only the state before each 16 tokens is kept. Backwards those in between are made again,
// 16 of them, which the cache holds; the gradient of the state goes along, from the last token to
// the first.
#include "recurrent_gradient.hpp"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "far_chunk.hpp"
#include "pool.hpp"
#include "recurrent_chunk.hpp"
#include "scratch.hpp"
#include "vec.hpp"

namespace respike {
namespace {
using std::int64_t;

// Working memory of a token; rows of values are padded to `values`.
struct GradientToken {
  int64_t values;
  float *decay, *answered;             // (keys)
  float *change, *missing, *d_change;  // (values): what is written; v less the answer
  float *q, *d_out;                    // (heads, keys): scaled; (heads, values)
};

struct GradientPlace {
  GradientToken token{};
  int64_t size;                // of a state
  float *kept, *states, *d;    // (chunks, size), (1 + chunk_tokens, size), (size)

  GradientPlace(const RecurrentGradientJob& job, Desk& desk) {
    token.values = padded(job.value_dim);
    size = job.key_dim * token.values;
    token.decay = desk.take<float>(job.key_dim);
    token.answered = desk.take<float>(job.key_dim);
    token.change = desk.take<float>(token.values);
    token.missing = desk.take<float>(token.values);
    token.d_change = desk.take<float>(token.values);
    token.q = desk.take<float>(job.heads * job.key_dim);
    token.d_out = desk.take<float>(job.heads * token.values);
    kept = desk.take<float>((job.tokens + chunk_tokens - 1) / chunk_tokens * size);
    states = desk.take<float>((1 + chunk_tokens) * size);
    d = desk.take<float>(size);
  }
};

}  // namespace
}  // namespace respike

#define RESPIKE_KERNELS "recurrent_rows.inc"
#include "each_level.hpp"
#define RESPIKE_KERNELS "recurrent_gradient_kernels.inc"
#include "each_level.hpp"

namespace respike {
namespace {

struct RecurrentGradientKernels {
  void (*forth)(const RecurrentGradientJob&, int64_t t, const float* before, float* after,
                const GradientToken&);
  void (*back)(const RecurrentGradientJob&, int64_t t, const float* before, const float* after,
               float* d, const GradientToken&);
};

RecurrentGradientKernels gradient_kernels([[maybe_unused]] Level level) {
#if RESPIKE_X86
  if (level >= Level::avx512) return {avx512::token_forth, avx512::token_back};
  if (level >= Level::avx2) return {avx2::token_forth, avx2::token_back};
#endif
  return {portable::token_forth, portable::token_back};
}

void run(const RecurrentGradientKernels& kernels, const RecurrentGradientJob& job, float* memory) {
  Desk desk(memory);
  const GradientPlace place(job, desk);
  const int64_t size = place.size, values = place.token.values, dim = job.value_dim;
  std::fill_n(place.states, size, 0.0f);
  copy_matrix(job.state, dim, job.key_dim, dim, place.states, values);
  float *before = place.states, *after = place.states + size;
  for (int64_t t = 0; t < job.tokens; ++t) {
    if (t % chunk_tokens == 0) std::copy_n(before, size, place.kept + t / chunk_tokens * size);
    kernels.forth(job, t, before, after, place.token);
    std::swap(before, after);
  }
  std::fill_n(place.d, size, 0.0f);
  copy_matrix(job.d_last, dim, job.key_dim, dim, place.d, values);
  for (int64_t end = job.tokens; end > 0;) {
    const int64_t start = (end - 1) / chunk_tokens * chunk_tokens;
    std::copy_n(place.kept + start / chunk_tokens * size, size, place.states);
    for (int64_t t = start; t < end; ++t) {
      float* state = place.states + (t - start) * size;
      kernels.forth(job, t, state, state + size, place.token);
    }
    for (int64_t t = end; t-- > start;) {
      const float* state = place.states + (t - start) * size;
      kernels.back(job, t, state, state + size, place.d, place.token);
    }
    end = start;
  }
  copy_matrix(place.d, values, job.key_dim, dim, job.d_state, dim);
}

}  // namespace

void recurrent_gradient(Level level, int threads, const RecurrentGradientJob* jobs,
                        int64_t count) {
  thread_local std::vector<float> scratch;
  int64_t floats = 0;
  for (int64_t j = 0; j < count; ++j) {
    Desk desk(nullptr);
    GradientPlace(jobs[j], desk);
    floats = std::max(floats, desk.used());
  }
  threads = static_cast<int>(std::clamp<int64_t>(std::min<int64_t>(threads, count), 1, max_threads));
  float* memory = kept(scratch, floats * threads);
  const RecurrentGradientKernels kernels = gradient_kernels(level);
  parallel_for(threads, count, [&](int64_t index, int slot) {
    run(kernels, jobs[index], memory + slot * floats);
  });
}

}  // namespace respike
