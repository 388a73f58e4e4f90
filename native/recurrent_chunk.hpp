// What the kernels of recurrent.cpp pass to each other: the working memory of a chunk of 16 tokens.
//
// Everything is float32 and padded with zeros to multiples of 16, so that no kernel has an edge.
// Tokens past the end of a sequence neither decay nor write. Within the chunk, tokens are numbered
// from 0; "left at i" of something is its product with all decays since, up to and with token i's.
#pragma once

#include "recurrent.hpp"

namespace respike {

constexpr std::int64_t chunk_tokens = 16;

inline std::int64_t padded(std::int64_t n) { return (n + 15) / 16 * 16; }

// Padded sizes of a job.
struct Shape {
  std::int64_t heads;
  std::int64_t inputs;  // key_dim
  std::int64_t keys;    // rows of the state: key_dim, or of a far memory its features
  std::int64_t values;  // its columns; the far memory's last one, the mass, is kept apart
  bool delta, far;
};

// What a job needs for all its chunks.
struct Sequence {
  float* state;  // (keys, values)
  float* mass;   // far: (keys)
  // far: weights as (inputs, keys), for keys and for each head; biases (1 + heads, keys), -inf
  // where there is no feature.
  float *key_weight, *query_weight, *bias;
};

struct Chunk {
  std::int64_t tokens;    // real ones
  float* rows;            // scratch (16, inputs)
  float* q;               // (heads, 16, keys): queries, scaled
  float* k;               // (keys, 16): keys times what is left of them at the end
  float* v;               // (16, values): what is written; delta: first strength * v
  float* weights;         // (heads, 16, 16): of each token's value in each output
  float* left;            // (16, 16): what is left at i of what was written at j
  float* since;           // (16): what is left of the state before the chunk
  float* total;           // (keys): and at the end
  const float* before;    // (keys, values): the state before the chunk
  float* out;             // scratch (16, values)
  float* answer;          // delta: (16, keys): what to subtract from v is this times the state
  float* system;          // delta: (16, 16): and this times what was written
  float* features;        // far: scratch (16, keys)
  float* best;            // far: (heads, 16): largest log of a feature, taken out of q
  const float* mass;      // far: (keys): mass column before the chunk
};

// Cuts a buffer into pieces; with a null buffer it only measures.
class Cutter {
 public:
  explicit Cutter(float* start) : start_(start) {}
  float* floats(std::int64_t count) {
    const std::int64_t at = used_;
    used_ += padded(count);
    return start_ == nullptr ? nullptr : start_ + at;
  }
  std::int64_t used() const { return used_; }

 private:
  float* start_;
  std::int64_t used_ = 0;
};

inline Sequence cut_sequence(const Shape& s, Cutter& cutter) {
  Sequence sequence{};
  sequence.state = cutter.floats(s.keys * s.values);
  if (s.far) {
    sequence.mass = cutter.floats(s.keys);
    sequence.key_weight = cutter.floats(s.inputs * s.keys);
    sequence.query_weight = cutter.floats(s.heads * s.inputs * s.keys);
    sequence.bias = cutter.floats((1 + s.heads) * s.keys);
  }
  return sequence;
}

inline Chunk cut_chunk(const Shape& s, Cutter& cutter) {
  Chunk c{};
  c.rows = cutter.floats(chunk_tokens * s.inputs);
  c.q = cutter.floats(s.heads * chunk_tokens * s.keys);
  c.k = cutter.floats(s.keys * chunk_tokens);
  c.v = cutter.floats(chunk_tokens * s.values);
  c.weights = cutter.floats(s.heads * chunk_tokens * chunk_tokens);
  c.left = cutter.floats(chunk_tokens * chunk_tokens);
  c.since = cutter.floats(chunk_tokens);
  c.total = cutter.floats(s.keys);
  c.out = cutter.floats(chunk_tokens * s.values);
  if (s.delta) {
    c.answer = cutter.floats(chunk_tokens * s.keys);
    c.system = cutter.floats(chunk_tokens * chunk_tokens);
  }
  if (s.far) {
    c.features = cutter.floats(chunk_tokens * s.keys);
    c.best = cutter.floats(s.heads * chunk_tokens);
  }
  return c;
}

}  // namespace respike
