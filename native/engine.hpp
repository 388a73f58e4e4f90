// The engine: a span of tokens through the layers of a decoder in one call. What is computed is
// defined by respike.models.decoder; respike.models.engine hands over weights and states.
//
// Letters as in Python: B sequences, T tokens of a span, D model width, H query heads, G KV
// groups, K head dim, R = H / G. Activations are (B, T, ...), contiguous.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <map>
#include <tuple>
#include <vector>

#include "blocks.hpp"
#include "keep.hpp"
#include "kernels.hpp"
#include "recurrent.hpp"
#include "softmax.hpp"
#include "spikes.hpp"

namespace respike {

struct DecoderShape {
  std::int64_t hidden;
  std::int64_t heads;
  std::int64_t groups;
  std::int64_t head_dim;
  std::int64_t intermediate;
  float eps;
  std::vector<double> frequencies;  // rotary, radians per token (K / 2)
};

// Parameters of a far memory, of all groups of its mixer one behind the other; see FarJob.
struct FarWeights {
  const float* key_weight;
  const float* key_bias;
  const float* query_weight;
  const float* beta;
  const float* log_decay;
  std::int64_t features;  // 0: no far memory
  const float* keep_weight;  // (groups, K)
  const float* keep_rate;    // (groups)
  std::int64_t kept;         // tokens that stay as they are; 0: none do
};

// Softmax for some KV groups: over everything before (window 0), over sinks and a window, or over
// blocks by a rule.
struct MixerWeights {
  std::vector<std::int64_t> groups;
  std::int64_t window;
  std::int64_t sinks;
  std::int64_t sink_reach;
  FarWeights far;
  const BlockTurns* turns;  // null: no blocks
  BlockRule rule;
};

// Those of a layer, in front of q, k and v, of o, of gate and up, and of down.
struct LayerNeurons {
  bool spike;  // else there are none
  Neurons qkv, o, mlp, down;
};

template <class T>
struct LayerWeights {
  const T* norm;
  const T* mlp_norm;
  const T* q_norm;  // (K); null, as k_norm: queries and keys are not normed
  const T* k_norm;
  PackedWeights q, k, v, o, gate, up, down;
  LayerNeurons neurons;
  std::vector<MixerWeights> mixers;
};

// A mixer's state, changed in place; see respike.layers.state.
template <class T>
struct MixerBuffers {
  T* k;  // (B, groups, slots, K), as v
  T* v;
  std::int64_t slots;
  float* memory;  // (B, groups, features, K + 1)
  T *kept_k, *kept_plain_k, *kept_v;  // (B, groups, kept, K)
  float* kept_worth;                  // (B, groups, kept)
  std::int64_t* kept_position;        // likewise
  T* summaries;   // of blocks (B, groups, summary_slots, K)
  std::int64_t summary_slots;
};

// Sequence b has seen start[b] tokens and goes on by valid[b]; the rest of its T is padding.
struct EngineSpan {
  std::vector<std::int64_t> start;
  std::vector<std::int64_t> valid;
  std::int64_t tokens;
};

// What lies between the steps of a layer; the caller's, so that a mixer may be his too.
template <class T>
struct Workspace {
  T* x;       // the residual stream (B, T, D)
  T* normed;  // what the projections read (B, T, D)
  T* q;       // (B, T, H, K), not rotated
  T* k;       // (B, T, G, K), not rotated
  T* v;       // (B, T, G, K)
  T* mixed;   // what the mixers made of them (B, T, H, K)
};

template <class T>
class Engine {
 public:
  Engine(DecoderShape shape, Activations activations, std::vector<LayerWeights<T>> layers);

  // x after layers [first, last). `buffers` has those of every mixer of these layers, in order.
  void run(Level level, int threads, const EngineSpan& span, const Workspace<T>& work,
           std::size_t first, std::size_t last, const std::vector<MixerBuffers<T>>& buffers);

  // The same in two steps, for layers whose mixers run elsewhere in between: from x to q, k and v;
  // and from mixed to x.
  void project(Level level, int threads, const EngineSpan& span, const Workspace<T>& work,
               std::size_t layer);
  void finish(Level level, int threads, const EngineSpan& span, const Workspace<T>& work,
              std::size_t layer);

 private:
  struct Call;
  struct Tables {
    std::vector<float> cos, sin;  // (B, T, K / 2)
  };
  // By which angles a span's tokens are turned: of their positions p; of min(p, reach - 1), if they
  // are sinks' queries; of back - p, which undoes it for the token `back` before; of p % block.
  struct Turn {
    std::int64_t reach, back, block;
    bool operator<(const Turn& other) const {
      return std::tie(reach, back, block) < std::tie(other.reach, other.back, other.block);
    }
  };
  // What the queries of one group see beside sinks, and what leaves the window; by step.
  struct Near {
    Keys<T> keys;
    std::int64_t first;          // position of the first key
    bool all_seen;               // by the only query; keys are in no order
    std::int64_t first_leaving;  // the first step at which a token leaves
    T* leaving_k;                // not rotated
    T* leaving_v;
    const T* leaving_turned;     // keys, rotated
  };

  void project(const Call& call, std::size_t layer);
  void mix(const Call& call, std::size_t layer, const MixerBuffers<T>* buffers);
  void finish(const Call& call, std::size_t layer);
  void add_jobs(const Call& call, const MixerWeights& mixer, const MixerBuffers<T>& buffers);
  FarJob<T> far_job(const Call& call, const MixerWeights& mixer, const SoftmaxJob<T>& softmax,
                    const Near& near, std::size_t b, std::size_t i) const;
  KeptJob<T> kept_job(const MixerWeights& mixer, const MixerBuffers<T>& buffers,
                      const SoftmaxJob<T>& softmax, const Near& near, std::size_t place,
                      std::size_t i) const;
  void add_blocks(const Call& call, const MixerWeights& mixer, const MixerBuffers<T>& buffers);
  Near all_before(const Call& call, const MixerBuffers<T>& mine, std::size_t b, std::int64_t g);
  Near within_window(const Call& call, const MixerWeights& mixer, const MixerBuffers<T>& mine,
                     std::size_t b, std::int64_t g);
  std::int64_t near_size(const Call& call, const MixerWeights& mixer) const;
  void rotate_back(const Call& call, const MixerWeights& mixer, std::size_t b, std::int64_t from,
                   std::int64_t to, const T* keys, T* out);
  const Tables& tables(const Call& call, Turn turn);
  void turn_heads(const Call& call, Turn turn, const T* x, std::int64_t heads, T* out);

  float scale() const;  // of scores
  void linears(const Call& call, std::size_t layer, Neurons LayerNeurons::*site, const T* x,
               std::initializer_list<PackedLinearJob<T>> jobs);

  DecoderShape shape_;
  Activations activations_;  // of the linear layers' inputs
  std::vector<LayerWeights<T>> layers_;

  // Scratch, for one call at a time: the caller sees to that.
  std::map<Turn, Tables> tables_;  // of the span at hand
  std::vector<T> q_rotated_, k_rotated_, added_, gate_, up_, gated_;
  std::map<std::int64_t, std::vector<T>> q_sink_;      // by sink reach
  std::map<std::int64_t, const T*> sink_queries_;      // those of the layer at hand
  std::vector<T> near_;                            // keys and values in order of time
  std::size_t near_used_ = 0;
  std::vector<float> mass_;
  std::vector<SoftmaxJob<T>> softmax_jobs_;
  std::vector<KeptJob<T>> kept_jobs_;
  std::vector<FarJob<T>> far_jobs_;
  std::vector<std::int32_t> counts_;
  std::vector<float> steps_;
  std::vector<T> k_in_blocks_;
  std::vector<BlocksJob<T>> blocks_jobs_;
};

}  // namespace respike
