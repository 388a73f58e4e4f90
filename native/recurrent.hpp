// Linear memories: gated linear attention, the gated delta rule, the far memory.
//
// The definitions are in respike.ops: gla, delta, far. A job is one KV group of one sequence: its
// keys, values, decays and its state are shared by its query heads. Strides count elements from
// token to token. One token is a step, in one pass over the state; more are worked through in
// chunks. Which threads do the work never shows in the bits.
#pragma once

#include <cstdint>

#include "bf16.hpp"
#include "cpu.hpp"

namespace respike {

template <class T>
struct GlaJob {
  const T *q, *k, *v;  // (tokens, heads, key_dim), (tokens, key_dim), (tokens, value_dim)
  std::int64_t q_stride, k_stride, v_stride;
  const float* log_decay;  // (tokens, key_dim) or (tokens, 1), at most 0; -inf forgets everything
  std::int64_t decay_stride;
  bool per_channel;
  float* state;  // (key_dim, value_dim), updated in place
  float* out;    // (tokens, heads, value_dim)
  std::int64_t out_stride;
  std::int64_t tokens, heads, key_dim, value_dim;
  float scale;
};

template <class T>
struct DeltaJob {
  const T *q, *k, *v;  // as GlaJob; keys of length at most 1
  std::int64_t q_stride, k_stride, v_stride;
  const float* strength;  // (tokens): share of the old value that is replaced
  std::int64_t strength_stride;
  const float* log_decay;  // (tokens)
  std::int64_t decay_stride;
  float* state;
  float* out;
  std::int64_t out_stride;
  std::int64_t tokens, heads, key_dim, value_dim;
  float scale;
};

// layers/far.py: features of the keys that leave the window, what the queries read of the memory,
// and one denominator for both.
template <class T>
struct FarJob {
  const T* q;  // (tokens, heads, key_dim), not rotated
  std::int64_t q_stride;
  const T *k, *v;  // of the token that leaves the window at each step; k not rotated
  std::int64_t k_stride, v_stride;
  std::int64_t first_real;                   // at steps before this none leaves: k, v are not read
  std::int64_t real;                         // steps from this on are padding: no decay either
  const float *key_weight, *key_bias;        // (features, key_dim), (features)
  const float *query_weight, *beta;          // (heads, features, key_dim), (heads); -inf: shut
  float log_decay;                           // of each step
  float* memory;                             // (features, value_dim + 1), updated in place
  const float* near_log_mass;                // (tokens, heads)
  std::int64_t mass_stride;
  T* near;  // (tokens, heads, value_dim): the window's output; becomes the joint one
  std::int64_t near_stride;
  std::int64_t tokens, heads, features, key_dim, value_dim;
};

template <class T>
void gla(Level level, int threads, const GlaJob<T>* jobs, std::int64_t count);
template <class T>
void delta(Level level, int threads, const DeltaJob<T>* jobs, std::int64_t count);
template <class T>
void far(Level level, int threads, const FarJob<T>* jobs, std::int64_t count);

}  // namespace respike
