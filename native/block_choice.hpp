// Which old blocks the tokens of a tile see: scores of summaries, and the best of them.
//
// Scores are not kept. Every query head of every token has a list of its best candidates so far,
// and the mass of all it has seen. When all are seen, a token sees the best of its heads' lists,
// less the logarithms of their masses: no block that is among a token's best can be missing in the
// list of the head that likes it best.
#pragma once

#include <cstdint>
#include <vector>

#include "blocks.hpp"

namespace respike {

// A tile's queries, row (token * heads + head), and the summaries to multiply them by.
template <class T>
struct Candidates {
  BlockRule rule;
  const BlockTurns* turns;
  const T* summaries;           // (blocks, deep, head_dim)
  std::int64_t deep;            // summaries of a block
  std::int64_t tokens, heads, head_dim;
  std::int64_t base, position;  // of the tile, and of its first token
  float factor;                 // scale * log2(e): scores are in powers of two
  const float* q;               // (rows, q_stride), rotated from the base on, then zeros
  std::int64_t q_stride;
  // Rotated by the reach and rounded to T. Of several tokens as SoftmaxParts::load_queries makes
  // cells, of one as q.
  const void* still;
  // Scratch: (64, head_dim) twice, key_panel(head_dim), (rows, 64), (heads, q_stride) with zeros
  // behind head_dim, and (head_dim).
  T* panel_rows;
  float *turned_rows, *panel, *products, *q_turned, *angles;

  std::int64_t rows() const { return tokens * heads; }
  // Blocks before this one are seen at the reach, from a position.
  std::int64_t limit(std::int64_t at) const { return rule.held(at); }
};

// What the rows of a tile have found.
struct Lists {
  std::int64_t rows, top;  // how many blocks a token may choose
  float* most;             // (rows), near the highest score seen; at first -inf
  float* mass;             // (rows, 16): partial sums of 2^(score - most); at first 0
  float* least;            // (rows): no lower score can be among the best; at first -inf
  std::int64_t* count;     // (rows), of what is in a list; at first 0
  float* score;            // (rows, room), in the order of blocks
  std::int32_t* block;     // (rows, room)

  // Of which a block of candidates and a vector may be written behind what is kept.
  std::int64_t room() const { return 3 * top + 2 * tile_width; }
};

// What one level does.
template <class T>
struct ChoiceParts {
  // Candidates [from, to) of the last token of several, into lists. Others see but theirs.
  void (*see_tile)(const Candidates<T>&, const Lists&, std::int64_t from, std::int64_t to);
  // Of one token: scores (heads, stride) of candidates [from, to); then, all at once, into lists.
  void (*score_token)(const Candidates<T>&, std::int64_t from, std::int64_t to, float* scores,
                      std::int64_t stride);
  void (*see_token)(const Candidates<T>&, const Lists&, std::int64_t from, std::int64_t to,
                    const float* scores, std::int64_t stride);
  // The blocks that a token, whose rows begin at `row`, sees.
  void (*choose)(const Lists&, std::int64_t row, std::int64_t heads,
                 std::vector<std::int32_t>& chosen);
};

template <class T>
ChoiceParts<T> choice_parts(Level level);

// Lists that have seen nothing, in `memory`, list_floats() of them.
std::int64_t list_floats(std::int64_t rows, std::int64_t top);
Lists clear_lists(std::int64_t rows, std::int64_t top, float* memory);

}  // namespace respike
