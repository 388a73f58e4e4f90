// Block-sparse softmax: sinks, a window, and the best few blocks of what is older.
//
// The definition is respike.ops.blocks.blocks_definition, which also says which positions keys and
// queries are rotated to. T, the type of queries, summaries and outputs, is float or bf16; E, that
// of cached keys and values, is T or int8_t.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "bf16.hpp"
#include "softmax.hpp"

namespace respike {

// respike.ops.block_rule.BlockRule.
struct BlockRule {
  std::int64_t window, sinks, block, summary, top, sink_reach, reach, true_tokens;
  static constexpr std::int64_t everywhere = std::numeric_limits<std::int64_t>::max();  // as reach

  std::int64_t sink_blocks() const { return (sinks + block - 1) / block; }
  std::int64_t first_near(std::int64_t position) const {
    return position < window ? 0 : (position - window + 1) / block;
  }
  // Blocks before this one are seen at no more than `reach`, from a position.
  static std::int64_t beyond(std::int64_t position, std::int64_t reach, std::int64_t block) {
    return position < reach ? 0 : (position - reach) / block + 1;
  }
  // The same of chosen blocks.
  std::int64_t held(std::int64_t position) const {
    return position < true_tokens ? 0 : beyond(position, reach, block);
  }
};

// Cosines and sines of the angles that a rule needs; made once for a model, then only read.
class BlockTurns {
 public:
  // Frequencies: head_dim / 2 of them, radians a token.
  BlockTurns(const BlockRule& rule, const double* frequencies, std::int64_t half);

  struct Row {
    const float* cos;
    const float* sin;
  };
  // Of 0 to block + most_tile_tokens - 1 tokens.
  Row tokens(std::int64_t count) const { return row(0, count); }
  Row reach() const { return row(tokens_, 0); }
  Row sink_reach() const { return row(tokens_, 1); }
  // Of a number of blocks, negative ones too, put into scratch, 2 * half floats.
  Row blocks(std::int64_t count, float* scratch) const;
  std::int64_t half() const { return half_; }

 private:
  Row row(std::int64_t at, std::int64_t index) const {
    const float* cos = table_.data() + (at + index) * 2 * half_;
    return {cos, cos + half_};
  }
  void add(double tokens);

  std::int64_t half_, tokens_;
  double block_;
  std::vector<double> frequencies_;
  std::vector<float> table_;
};

// One KV group of one sequence, whose cache holds the tokens of the queries already.
template <class T, class E = T>
struct BlocksJob {
  const T* q;             // (tokens, heads, head_dim), heads of the group together; NOT rotated
  std::int64_t q_stride;  // from one token to the next
  Keys<E> keys;           // row j is that of position j, rotated within its block
  const T* summaries;     // (blocks, block / summary, head_dim), of all complete blocks
  std::int64_t start;     // query t is at position start + t
  std::int64_t tokens, heads, head_dim, value_dim;
  float scale;            // of scores
  T* out;                 // (tokens, heads, value_dim)
  std::int64_t out_stride;
  // What gradients need to know; null: not wanted.
  float* log_mass = nullptr;  // (tokens, heads), logarithm of the denominator
  std::int64_t mass_stride = 0;
  // (tokens, chosen_words(..)): bit b of a token: it chose block b. Of a token with no more
  // candidates than it may choose, which sees them all, nothing is said.
  std::uint64_t* chosen = nullptr;
  static constexpr std::int64_t chosen_words(std::int64_t blocks) { return (blocks + 63) / 64; }
  std::int64_t chosen_stride = 0;
};

// One query or many. The bits do not depend on the number of threads.
template <class T, class E>
void blocks(Level level, int threads, const BlockRule& rule, const BlockTurns& turns,
            const BlocksJob<T, E>* jobs, std::int64_t count);

}  // namespace respike
