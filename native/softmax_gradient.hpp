// Gradients of softmax attention, for exact keys: whole jobs, and the step they are made of.
//
// The definition is autograd through respike.ops.softmax.window_softmax_definition; the form in
// torch is respike.ops.softmax_gradient. T, the type of everything that is not float32 anyway, is
// float or bf16.
#pragma once

#include <cstdint>

#include "softmax.hpp"

namespace respike {

// Of what SoftmaxJob computes, with its out and log_mass as they were found. Rows of gradients lie
// as those of queries (tokens, heads, head_dim) at q_stride, or one after the other.
template <class T>
struct SoftmaxGradientJob {
  SoftmaxJob<T> forward;
  const T* d_out;       // as forward.out
  const float* d_mass;  // as forward.log_mass
  T* d_q;
  T* d_q_sink;          // null: q and q_sink are the same, and d_q is of both
  T *d_k, *d_v;         // (keys.count, head_dim), (keys.count, value_dim)
  T *d_sink_k, *d_sink_v;
};

// The bits do not depend on the number of threads: what is cut where depends on the jobs alone.
template <class T>
void softmax_gradient(Level level, int threads, const SoftmaxGradientJob<T>* jobs,
                      std::int64_t count);

// ---- the step: at most 64 queries and 64 keys

// Queries of a softmax, row (token * heads + head), and what is known of them.
template <class T>
struct GradientRows {
  const T* q;
  std::int64_t q_stride;  // from token to token
  const T* d_out;
  std::int64_t out_stride;
  const float* exact;  // queries in float32, also at q_stride, instead of q; or null
  const float* mass;   // (rows): logarithm to base 2 of the denominator
  const float* delta;  // (rows): sum of d_out * out, less the mass's gradient
  float* d_q;          // (rows, 64 * value_tiles(head_dim)): added to, before `scale`
  std::int64_t heads, head_dim, value_dim;
  float factor;        // scale * log2(e)
};

// What a step works with; all of it starts on a cache line.
template <class T>
struct GradientDesk {
  T *rows, *out_rows;                // gathered queries and d_out
  float* exact_rows;                 // queries in float32
  float *q, *q_turned;               // panels of them, (rows, ..) and (.., rows)
  float *d_out, *d_out_turned;
  float *mass, *delta;               // (64): of each query
  float *from, *to;                  // (64, 64): the keys of the block that it sees
  float *k, *v;                      // cells (64, query_row(..)) of keys and values; of exact
                                     // queries, k is float32
  float* k_rows;                     // panel of keys (keys, ..)
  float *d_k, *d_v;                  // (value_tiles(..), 64, 64): the block's sums so far
  float *scores, *d_scores;          // (64, 64), keys first
  float *weights, *d_weights;        // cells of the same
  float* d_turned;                   // and of d_scores, queries first
  float* d_q;                        // (64, 64)
};

template <class T, class Memory>
GradientDesk<T> gradient_desk(std::int64_t head_dim, std::int64_t value_dim, Memory& memory) {
  constexpr std::int64_t side = block_keys, square = side * side;
  GradientDesk<T> desk{};
  desk.rows = memory.template take<T>(side * head_dim);
  desk.out_rows = memory.template take<T>(side * value_dim);
  desk.exact_rows = memory.template take<float>(side * head_dim);
  desk.q = memory.template take<float>(value_panel(head_dim));
  desk.q_turned = memory.template take<float>(key_panel(head_dim));
  desk.d_out = memory.template take<float>(value_panel(value_dim));
  desk.d_out_turned = memory.template take<float>(key_panel(value_dim));
  desk.mass = memory.template take<float>(side);
  desk.delta = memory.template take<float>(side);
  desk.k = memory.template take<float>(side * query_row(head_dim));
  desk.v = memory.template take<float>(side * query_row(value_dim));
  desk.k_rows = memory.template take<float>(value_panel(head_dim));
  desk.d_k = memory.template take<float>(value_panel(head_dim));
  desk.d_v = memory.template take<float>(value_panel(value_dim));
  for (float** part : {&desk.scores, &desk.d_scores, &desk.weights, &desk.d_weights,
                       &desk.d_turned, &desk.d_q, &desk.from, &desk.to}) {
    *part = memory.template take<float>(square);
  }
  return desk;
}

}  // namespace respike
