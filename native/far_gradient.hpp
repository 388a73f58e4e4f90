// Gradients of the far memory. The definition is autograd through respike.ops.far.far_torch.
#pragma once

#include "recurrent.hpp"

namespace respike {

// Of what FarJob computes: `forward.near` is the window's output still, `forward.memory` is only
// read, and neither memory has a gradient. Gradients of tokens lie as d_joint does, at strides of
// their own; those of the prototypes are of this job alone.
template <class T>
struct FarGradientJob {
  FarJob<T> forward;
  const T* d_joint;  // as forward.near
  T* d_near;         // likewise
  float* d_near_mass;  // as forward.near_log_mass
  T *d_q, *d_k, *d_v;
  std::int64_t d_q_stride, d_k_stride, d_v_stride;
  float *d_key_weight, *d_key_bias;  // (features, key_dim), (features)
  float *d_query_weight, *d_beta;    // (heads, features, key_dim), (heads)
  float* d_log_decay;
};

// The bits do not depend on the number of threads.
template <class T>
void far_gradient(Level level, int threads, const FarGradientJob<T>* jobs, std::int64_t count);

}  // namespace respike
