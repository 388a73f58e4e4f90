// Gradients of gated linear attention and the gated delta rule; the definitions are autograd
// through those of respike.ops.
#pragma once

#include <cstdint>

#include "cpu.hpp"

namespace respike {

// One KV group of one sequence, in float32. Strides count elements from token to token; gradients
// lie as what they are of.
struct RecurrentGradientJob {
  const float *q, *k, *v;  // (tokens, heads, key_dim), (tokens, key_dim), (tokens, value_dim)
  const float* strength;   // (tokens): of the delta rule; null: gated linear attention
  const float* log_decay;  // (tokens, key_dim) or (tokens, 1)
  const float* state;      // (key_dim, value_dim), before the first token
  const float* d_out;      // (tokens, heads, value_dim)
  const float* d_last;     // of the state after the last token
  float *d_q, *d_k, *d_v, *d_strength, *d_log_decay, *d_state;
  std::int64_t q_stride, k_stride, v_stride, strength_stride, decay_stride, out_stride;
  std::int64_t tokens, heads, key_dim, value_dim;
  bool per_channel;
  float scale;
};

// The bits do not depend on the number of threads.
void recurrent_gradient(Level level, int threads, const RecurrentGradientJob* jobs,
                        std::int64_t count);

}  // namespace respike
