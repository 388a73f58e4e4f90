// How the far memory's chunks begin, for its kernel and for that of its gradients.
#pragma once

#include <algorithm>
#include <limits>

#include "recurrent_chunk.hpp"

namespace respike {
using std::int64_t;

template <class T>
Shape shape_of(const FarJob<T>& job) {
  return {job.heads, padded(job.key_dim), padded(job.features), padded(job.value_dim), false, true};
}

inline void copy_matrix(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                 int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    std::copy_n(from + i * from_stride, columns, to + i * to_stride);
  }
}

// (F, K) becomes (K, F), padded; so do its biases, with -inf.
inline void open_weight(const float* weight, int64_t features, int64_t key_dim, const Shape& s,
                 float* turned) {
  std::fill_n(turned, s.inputs * s.keys, 0.0f);
  for (int64_t f = 0; f < features; ++f) {
    for (int64_t k = 0; k < key_dim; ++k) turned[k * s.keys + f] = weight[f * key_dim + k];
  }
}

template <class T>
void open(const FarJob<T>& job, const Shape& s, const Sequence& all) {
  const int64_t F = job.features, columns = job.value_dim + 1;
  std::fill_n(all.state, s.keys * s.values, 0.0f);
  copy_matrix(job.memory, columns, F, job.value_dim, all.state, s.values);
  std::fill_n(all.mass, s.keys, 0.0f);
  copy_matrix(job.memory + job.value_dim, columns, F, 1, all.mass, 1);
  std::fill_n(all.bias, (1 + s.heads) * s.keys, -std::numeric_limits<float>::infinity());
  std::copy_n(job.key_bias, F, all.bias);
  open_weight(job.key_weight, F, job.key_dim, s, all.key_weight);
  for (int64_t h = 0; h < s.heads; ++h) {
    std::fill_n(all.bias + (1 + h) * s.keys, F, job.beta[h]);
    open_weight(job.query_weight + h * F * job.key_dim, F, job.key_dim, s,
                all.query_weight + h * s.inputs * s.keys);
  }
}

}  // namespace respike
