// Gradients of block-sparse softmax, for exact keys and the blocks that the forward pass chose. The
// definition is autograd through respike.ops.blocks.blocks_definition.
#pragma once

#include <cstdint>

#include "blocks.hpp"

namespace respike {

// Of what BlocksJob computes, with its out, log_mass and chosen as they were found.
template <class T>
struct BlocksGradientJob {
  BlocksJob<T> forward;
  const T* d_out;  // as forward.out
  T* d_q;          // as forward.q
  T *d_k, *d_v;    // (keys.count, head_dim), (keys.count, value_dim)
};

// The bits do not depend on the number of threads.
template <class T>
void blocks_gradient(Level level, int threads, const BlockRule& rule, const BlockTurns& turns,
                     const BlocksGradientJob<T>* jobs, std::int64_t count);

}  // namespace respike
