// Attention to kept tokens where it is known who is kept when, and its gradients: for training.
//
// The definition is respike.ops.keep.attend_kept in torch. T is float or bf16.
#pragma once

#include <cstdint>

#include "bf16.hpp"

namespace respike {

// One KV group of one sequence. Candidates: those kept before, then one that each step brings.
template <class T>
struct KeptAttentionJob {
  const T* q;                // (tokens, heads, dim), rotated
  const T *k, *v;            // (places + tokens, dim), rotated keys of the candidates, and values
  const std::int64_t* held;  // candidates seen before steps 0, every, .., (.., places); -1: nobody
  const std::int64_t* until; // (places + tokens): the first step at which each is not seen any more
  std::int64_t q_stride, every, places, tokens, heads, dim;
  float scale;               // of scores
  float* mean;               // (tokens, heads, dim) at q_stride; 0 where nobody is seen
  float* log_mass;           // (tokens, heads): logarithm of the denominator; -inf likewise
  std::int64_t mass_stride;
};

template <class T>
struct KeptGradientJob {
  KeptAttentionJob<T> forward;  // with its log_mass as it was found; mean is not looked at
  const T* d_mean;              // as mean
  const float* delta;           // as log_mass: sum of d_mean * mean, less log_mass's gradient
  T* d_q;                       // as q
  T *d_k, *d_v;                 // (places + tokens, dim)
};

template <class T>
void kept_attention(Level level, int threads, const KeptAttentionJob<T>* jobs, std::int64_t count);

// The bits do not depend on the number of threads.
template <class T>
void kept_gradient(Level level, int threads, const KeptGradientJob<T>* jobs, std::int64_t count);

}  // namespace respike
