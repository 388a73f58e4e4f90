// See engine.hpp.
#include "engine.hpp"

#include <algorithm>
#include <cmath>

namespace respike {

using std::int64_t;
using std::size_t;

namespace {

template <class T>
T* grown(std::vector<T>& buffer, int64_t elements) {
  if (static_cast<int64_t>(buffer.size()) < elements) {
    buffer.resize(static_cast<size_t>(elements));
  }
  return buffer.data();
}

template <class T>
void copy_rows(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows,
               int64_t cols) {
  for (int64_t r = 0; r < rows; ++r) std::copy_n(from + r * from_stride, cols, to + r * to_stride);
}

template <class T>
Keys<T> keys_at(const T* k, const T* v, int64_t dim, int64_t count) {
  Keys<T> keys;
  keys.k = k;
  keys.v = v;
  keys.stride = dim;
  keys.count = count;
  return keys;
}

// The mean of `count` rows.
template <class T>
void summarise(const T* rows, int64_t count, int64_t dim, T* out) {
  for (int64_t c = 0; c < dim; ++c) {
    float sum = 0.0f;
    for (int64_t i = 0; i < count; ++i) sum += load(rows + i * dim + c);
    store(out + c, sum / static_cast<float>(count));
  }
}

// Tokens [position, position + count) of a ring, in which token p lies in slot p % slots, as runs of
// neighbours: run(slot, tokens before it, tokens of it).
template <class Run>
void each_run(int64_t slots, int64_t position, int64_t count, const Run& run) {
  for (int64_t done = 0; done < count;) {
    const int64_t slot = (position + done) % slots;
    const int64_t length = std::min(count - done, slots - slot);
    run(slot, done, length);
    done += length;
  }
}

}  // namespace

// What all steps of a call are told.
template <class T>
struct Engine<T>::Call {
  Level level;
  int threads;
  const EngineSpan& span;
  const Workspace<T>& work;

  size_t batch() const { return span.start.size(); }
  int64_t rows() const { return static_cast<int64_t>(batch()) * span.tokens; }
  int64_t end(size_t b) const { return span.start[b] + span.valid[b]; }
  int64_t last() const {
    int64_t most = 0;
    for (size_t b = 0; b < batch(); ++b) most = std::max(most, end(b));
    return most;
  }
};

template <class T>
Engine<T>::Engine(DecoderShape shape, Activations activations,
                  std::vector<LayerWeights<T>> layers)
    : shape_(std::move(shape)), activations_(activations), layers_(std::move(layers)) {}

template <class T>
float Engine<T>::scale() const {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(shape_.head_dim)));
}

template <class T>
void Engine<T>::run(Level level, int threads, const EngineSpan& span, const Workspace<T>& work,
                    size_t first, size_t last, const std::vector<MixerBuffers<T>>& buffers) {
  const Call call{level, threads, span, work};
  tables_.clear();
  const MixerBuffers<T>* next = buffers.data();
  for (size_t layer = first; layer < last; ++layer) {
    project(call, layer);
    mix(call, layer, next);
    finish(call, layer);
    next += layers_[layer].mixers.size();
  }
}

template <class T>
void Engine<T>::project(Level level, int threads, const EngineSpan& span, const Workspace<T>& work,
                        size_t layer) {
  project({level, threads, span, work}, layer);
}

template <class T>
void Engine<T>::finish(Level level, int threads, const EngineSpan& span, const Workspace<T>& work,
                       size_t layer) {
  finish({level, threads, span, work}, layer);
}

template <class T>
void Engine<T>::project(const Call& call, size_t layer) {
  const LayerWeights<T>& weights = layers_[layer];
  const Workspace<T>& work = call.work;
  const int64_t rows = call.rows();
  rms_norm(call.level, call.threads, work.x, weights.norm, work.normed, rows, shape_.hidden,
           shape_.eps);
  linears(call, layer, &LayerNeurons::qkv, work.normed,
          {{weights.q, work.q, weights.q.outputs},
           {weights.k, work.k, weights.k.outputs},
           {weights.v, work.v, weights.v.outputs}});
  if (weights.q_norm == nullptr) return;
  const int64_t dim = shape_.head_dim;
  rms_norm(call.level, call.threads, work.q, weights.q_norm, work.q, rows * shape_.heads, dim,
           shape_.eps);
  rms_norm(call.level, call.threads, work.k, weights.k_norm, work.k, rows * shape_.groups, dim,
           shape_.eps);
}

// Linear layers that read the same rows, behind their neurons if they have any.
template <class T>
void Engine<T>::linears(const Call& call, size_t layer, Neurons LayerNeurons::*site, const T* x,
                        std::initializer_list<PackedLinearJob<T>> jobs) {
  const int64_t rows = call.rows();
  const auto count = static_cast<int64_t>(jobs.size());
  if (!layers_[layer].neurons.spike) {
    packed_linears(call.level, call.threads, x, rows, jobs.begin(), count, activations_);
    return;
  }
  const int64_t inputs = jobs.begin()->weights.inputs;
  const Fired fired{grown(counts_, rows * inputs), grown(steps_, rows), rows};
  fire(call.level, call.threads, x, rows, inputs, layers_[layer].neurons.*site, counts_.data(),
       steps_.data());
  spike_linears(call.level, call.threads, fired, jobs.begin(), count, SpikeForm::best);
}

template <class T>
void Engine<T>::finish(const Call& call, size_t layer) {
  const LayerWeights<T>& weights = layers_[layer];
  const Workspace<T>& work = call.work;
  const int64_t rows = call.rows();
  const int64_t width = shape_.intermediate;
  T* added = grown(added_, rows * shape_.hidden);
  T* gate = grown(gate_, rows * width);
  T* up = grown(up_, rows * width);
  T* gated = grown(gated_, rows * width);
  linears(call, layer, &LayerNeurons::o, work.mixed, {{weights.o, added, shape_.hidden}});
  add_rms_norm(call.level, call.threads, work.x, added, weights.mlp_norm, work.x, work.normed, rows,
               shape_.hidden, shape_.eps);
  linears(call, layer, &LayerNeurons::mlp, work.normed,
          {{weights.gate, gate, width}, {weights.up, up, width}});
  swiglu(call.level, call.threads, gate, width, up, width, gated, rows, width);
  linears(call, layer, &LayerNeurons::down, gated, {{weights.down, added, shape_.hidden}});
  add(call.level, call.threads, work.x, added, work.x, rows, shape_.hidden);
}

template <class T>
const typename Engine<T>::Tables& Engine<T>::tables(const Call& call, Turn turn) {
  const auto found = tables_.find(turn);
  if (found != tables_.end()) return found->second;
  Tables& made = tables_[turn];
  const size_t half = shape_.frequencies.size();
  made.cos.resize(static_cast<size_t>(call.rows()) * half);
  made.sin.resize(made.cos.size());
  size_t at = 0;
  for (size_t b = 0; b < call.batch(); ++b) {
    for (int64_t t = 0; t < call.span.tokens; ++t) {
      int64_t position = call.span.start[b] + t;
      if (turn.reach > 0) position = std::min(position, turn.reach - 1);
      if (turn.back > 0) position = turn.back - position;
      if (turn.block > 0) position %= turn.block;
      for (size_t i = 0; i < half; ++i, ++at) {
        const double angle = static_cast<double>(position) * shape_.frequencies[i];
        made.cos[at] = static_cast<float>(std::cos(angle));
        made.sin[at] = static_cast<float>(std::sin(angle));
      }
    }
  }
  return made;
}

// Rotates heads (B, T, heads, K) of the span.
template <class T>
void Engine<T>::turn_heads(const Call& call, Turn turn, const T* x, int64_t heads, T* out) {
  const Tables& angles = tables(call, turn);
  const int64_t stride = heads * shape_.head_dim;
  rotate(call.level, call.threads, x, stride, angles.cos.data(), angles.sin.data(), out, stride,
         call.rows(), heads, shape_.head_dim / 2);
}

template <class T>
void Engine<T>::mix(const Call& call, size_t layer, const MixerBuffers<T>* buffers) {
  const Workspace<T>& work = call.work;
  const int64_t dim = shape_.head_dim;
  const int64_t rows = call.rows();
  const int64_t q_stride = shape_.heads * dim;
  const int64_t k_stride = shape_.groups * dim;
  turn_heads(call, {}, work.q, shape_.heads, grown(q_rotated_, rows * q_stride));
  turn_heads(call, {}, work.k, shape_.groups, grown(k_rotated_, rows * k_stride));

  const std::vector<MixerWeights>& mixers = layers_[layer].mixers;
  int64_t near = 0;
  sink_queries_.clear();
  for (const MixerWeights& mixer : mixers) {
    near += static_cast<int64_t>(call.batch() * mixer.groups.size()) * near_size(call, mixer);
    const int64_t reach = mixer.sink_reach;
    if (mixer.sinks == 0 || call.last() <= reach || sink_queries_.count(reach) > 0) continue;
    T* q_sink = grown(q_sink_[reach], rows * q_stride);
    turn_heads(call, {reach, 0, 0}, work.q, shape_.heads, q_sink);
    sink_queries_[reach] = q_sink;
  }
  grown(near_, near);
  grown(mass_, rows * shape_.heads);
  near_used_ = 0;
  softmax_jobs_.clear();
  kept_jobs_.clear();
  far_jobs_.clear();
  for (size_t m = 0; m < mixers.size(); ++m) {
    if (mixers[m].turns == nullptr) {
      add_jobs(call, mixers[m], buffers[m]);
      continue;
    }
    blocks_jobs_.clear();
    add_blocks(call, mixers[m], buffers[m]);
    blocks(call.level, call.threads, mixers[m].rule, *mixers[m].turns, blocks_jobs_.data(),
           static_cast<int64_t>(blocks_jobs_.size()));
  }
  softmax(call.level, call.threads, softmax_jobs_.data(),
          static_cast<int64_t>(softmax_jobs_.size()));
  attend_kept(call.level, call.threads, kept_jobs_.data(),
              static_cast<int64_t>(kept_jobs_.size()));
  far(call.level, call.threads, far_jobs_.data(), static_cast<int64_t>(far_jobs_.size()));
}

// Stores the span's keys, rotated within their blocks, its values, and the summaries it completes.
template <class T>
void Engine<T>::add_blocks(const Call& call, const MixerWeights& mixer,
                           const MixerBuffers<T>& buffers) {
  const int64_t dim = shape_.head_dim;
  const int64_t heads = shape_.heads / shape_.groups;
  const int64_t q_stride = shape_.heads * dim;
  const int64_t k_stride = shape_.groups * dim;
  const int64_t size = mixer.rule.summary;
  T* turned = grown(k_in_blocks_, call.rows() * k_stride);
  turn_heads(call, {0, 0, mixer.rule.block}, call.work.k, shape_.groups, turned);
  for (size_t b = 0; b < call.batch(); ++b) {
    const int64_t start = call.span.start[b];
    const int64_t valid = call.span.valid[b];
    const int64_t row = static_cast<int64_t>(b) * call.span.tokens;
    if (valid == 0) continue;
    for (size_t i = 0; i < mixer.groups.size(); ++i) {
      const int64_t g = mixer.groups[i];
      const auto place = static_cast<int64_t>(b * mixer.groups.size() + i);
      const int64_t from = row * k_stride + g * dim;
      const int64_t at = row * q_stride + g * heads * dim;
      T* k = buffers.k + place * buffers.slots * dim;
      T* v = buffers.v + place * buffers.slots * dim;
      T* summaries = buffers.summaries + place * buffers.summary_slots * dim;
      copy_rows(turned + from, k_stride, k + start * dim, dim, valid, dim);
      copy_rows(call.work.v + from, k_stride, v + start * dim, dim, valid, dim);
      for (int64_t s = start / size; s < (start + valid) / size; ++s) {
        summarise(k + s * size * dim, size, dim, summaries + s * dim);
      }
      blocks_jobs_.push_back({call.work.q + at, q_stride, keys_at(k, v, dim, start + valid),
                              summaries, start, valid, heads, dim, dim, scale(),
                              call.work.mixed + at, q_stride});
    }
  }
}

// Elements of near_ for one group: keys and values of the window and of the span, and by step the
// keys that leave, not rotated, and room for values of steps before the first that leaves.
template <class T>
int64_t Engine<T>::near_size(const Call& call, const MixerWeights& mixer) const {
  return (2 * mixer.window + 4 * call.span.tokens) * shape_.head_dim;
}

template <class T>
void Engine<T>::add_jobs(const Call& call, const MixerWeights& mixer,
                         const MixerBuffers<T>& buffers) {
  const int64_t dim = shape_.head_dim;
  const int64_t heads = shape_.heads / shape_.groups;
  const int64_t q_stride = shape_.heads * dim;
  const auto sink_queries = sink_queries_.find(mixer.sink_reach);
  for (size_t b = 0; b < call.batch(); ++b) {
    if (call.span.valid[b] == 0) continue;
    for (size_t i = 0; i < mixer.groups.size(); ++i) {
      const int64_t g = mixer.groups[i];
      const size_t place = b * mixer.groups.size() + i;
      const int64_t row = static_cast<int64_t>(b) * call.span.tokens;
      const int64_t at = row * q_stride + g * heads * dim;
      MixerBuffers<T> mine = buffers;
      const auto offset = static_cast<int64_t>(place) * buffers.slots * dim;
      mine.k += offset;
      mine.v += offset;
      const bool windowed = mixer.window > 0;
      const Near near = windowed ? within_window(call, mixer, mine, b, g)
                                 : all_before(call, mine, b, g);
      SoftmaxJob<T> job{};
      job.q = q_rotated_.data() + at;
      job.q_sink = sink_queries == sink_queries_.end() ? job.q : sink_queries->second + at;
      job.q_stride = q_stride;
      job.sinks = keys_at(mine.k, mine.v, dim, std::min(mixer.sinks, call.end(b)));
      job.keys = near.keys;
      job.first = near.first;
      job.start = call.span.start[b];
      job.tokens = call.span.valid[b];
      job.heads = heads;
      job.head_dim = dim;
      job.value_dim = dim;
      job.window = near.all_seen || !windowed ? without_window : mixer.window;
      job.scale = scale();
      job.out = call.work.mixed + at;
      job.out_stride = q_stride;
      if (mixer.far.features > 0) {
        job.log_mass = mass_.data() + row * shape_.heads + g * heads;
        job.mass_stride = shape_.heads;
        far_jobs_.push_back(far_job(call, mixer, job, near, b, i));
        far_jobs_.back().memory =
            buffers.memory + static_cast<int64_t>(place) * mixer.far.features * (dim + 1);
        if (mixer.far.kept > 0) {
          kept_jobs_.push_back(kept_job(mixer, buffers, job, near, place, i));
          const int64_t first = kept_jobs_.back().rule.first_lost(mixer.far.kept) - job.start;
          far_jobs_.back().first_real = std::clamp<int64_t>(first, 0, job.tokens);
        }
      }
      softmax_jobs_.push_back(job);
    }
  }
}

template <class T>
FarJob<T> Engine<T>::far_job(const Call& call, const MixerWeights& mixer,
                             const SoftmaxJob<T>& softmax, const Near& near, size_t b,
                             size_t i) const {
  const FarWeights& far = mixer.far;
  const auto group = static_cast<int64_t>(i);
  FarJob<T> job{};
  job.q = call.work.q + (softmax.out - call.work.mixed);
  job.q_stride = softmax.q_stride;
  job.k = near.leaving_k;
  job.v = near.leaving_v;
  job.k_stride = job.v_stride = softmax.head_dim;
  job.first_real = near.first_leaving;
  job.real = call.span.valid[b];
  job.key_weight = far.key_weight + group * far.features * softmax.head_dim;
  job.key_bias = far.key_bias + group * far.features;
  job.query_weight = far.query_weight + group * softmax.heads * far.features * softmax.head_dim;
  job.beta = far.beta + group * softmax.heads;
  job.log_decay = far.log_decay[group];
  job.near_log_mass = softmax.log_mass;
  job.mass_stride = softmax.mass_stride;
  job.near = softmax.out;
  job.near_stride = softmax.out_stride;
  job.tokens = call.span.valid[b];
  job.heads = softmax.heads;
  job.features = far.features;
  job.key_dim = softmax.head_dim;
  job.value_dim = softmax.value_dim;
  return job;
}

template <class T>
KeptJob<T> Engine<T>::kept_job(const MixerWeights& mixer, const MixerBuffers<T>& buffers,
                               const SoftmaxJob<T>& softmax, const Near& near, size_t place,
                               size_t i) const {
  const int64_t dim = softmax.head_dim, places = mixer.far.kept;
  const auto first = static_cast<int64_t>(place) * places;
  KeptJob<T> job{};
  job.rule = {mixer.window, mixer.sinks, mixer.sink_reach};
  job.start = softmax.start;
  job.first_leaving = near.first_leaving;
  job.q = softmax.q;
  job.q_stride = softmax.q_stride;
  job.turned = near.leaving_turned;
  job.plain = near.leaving_k;
  job.values = near.leaving_v;
  job.k = buffers.kept_k + first * dim;
  job.plain_k = buffers.kept_plain_k + first * dim;
  job.v = buffers.kept_v + first * dim;
  job.worth = buffers.kept_worth + first;
  job.position = buffers.kept_position + first;
  job.places = places;
  job.weight = mixer.far.keep_weight + static_cast<int64_t>(i) * dim;
  job.rate = mixer.far.keep_rate[i];
  job.near = softmax.out;
  job.near_stride = softmax.out_stride;
  job.near_log_mass = softmax.log_mass;
  job.mass_stride = softmax.mass_stride;
  job.tokens = softmax.tokens;
  job.heads = softmax.heads;
  job.dim = dim;
  job.scale = softmax.scale;
  return job;
}

// Stores the span's keys and values in a cache whose slot is the position.
template <class T>
typename Engine<T>::Near Engine<T>::all_before(const Call& call, const MixerBuffers<T>& mine,
                                               size_t b, int64_t g) {
  const int64_t dim = shape_.head_dim;
  const int64_t stride = shape_.groups * dim;
  const int64_t from = static_cast<int64_t>(b) * call.span.tokens * stride + g * dim;
  const int64_t start = call.span.start[b];
  copy_rows(k_rotated_.data() + from, stride, mine.k + start * dim, dim, call.span.valid[b], dim);
  copy_rows(call.work.v + from, stride, mine.v + start * dim, dim, call.span.valid[b], dim);
  Near near{};
  near.keys = keys_at(mine.k, mine.v, dim, call.end(b));
  return near;
}

// Stores the span's keys and values as sinks and in the ring behind them. What the ring forgets on
// the way is still seen by the span's first queries, and then leaves for the far memory: so the
// window and the span are laid out in order of time first, unless there is but one token.
template <class T>
typename Engine<T>::Near Engine<T>::within_window(const Call& call, const MixerWeights& mixer,
                                                  const MixerBuffers<T>& mine, size_t b,
                                                  int64_t g) {
  const int64_t dim = shape_.head_dim;
  const int64_t stride = shape_.groups * dim;
  const int64_t from = static_cast<int64_t>(b) * call.span.tokens * stride + g * dim;
  const int64_t start = call.span.start[b];
  const int64_t valid = call.span.valid[b];
  const int64_t sinks = mixer.sinks;
  const int64_t window = mixer.window;
  const T* new_k = k_rotated_.data() + from;
  const T* new_v = call.work.v + from;
  T* ring_k = mine.k + sinks * dim;
  T* ring_v = mine.v + sinks * dim;

  T* const leaving_k = near_.data() + near_used_;
  T* const values = leaving_k + 2 * call.span.tokens * dim;
  near_used_ += static_cast<size_t>(near_size(call, mixer));

  // Tokens that become sinks, once for all.
  const int64_t new_sinks = std::clamp<int64_t>(sinks - start, 0, valid);
  copy_rows(new_k, stride, mine.k + start * dim, dim, new_sinks, dim);
  copy_rows(new_v, stride, mine.v + start * dim, dim, new_sinks, dim);
  new_k += new_sinks * stride;
  new_v += new_sinks * stride;

  // In the ring lie positions [first, begin); the span adds [begin, end). Both count from the sinks.
  const int64_t begin = std::max<int64_t>(start - sinks, 0);
  const int64_t first = std::max<int64_t>(begin - window, 0);
  const int64_t end = begin + valid - new_sinks;
  Near near{};
  near.first_leaving = std::min(std::max<int64_t>(window - begin, 0) + new_sinks, valid);
  near.leaving_k = leaving_k;
  near.leaving_v = values - near.first_leaving * dim;
  T* const keys = values + (window + call.span.tokens) * dim;
  near.leaving_turned = keys - near.first_leaving * dim;

  if (valid == 1) {
    if (end > begin) {
      const int64_t slot = begin % window;
      if (near.first_leaving == 0) {
        rotate_back(call, mixer, b, 0, 1, ring_k + slot * dim, leaving_k);
        std::copy_n(ring_v + slot * dim, dim, values);
        std::copy_n(ring_k + slot * dim, dim, keys);
      }
      std::copy_n(new_k, dim, ring_k + slot * dim);
      std::copy_n(new_v, dim, ring_v + slot * dim);
    }
    near.keys = keys_at(ring_k, ring_v, dim, std::min(end, window));
    near.all_seen = true;
    return near;
  }
  const int64_t old = begin - first;
  each_run(window, first, old, [&](int64_t slot, int64_t done, int64_t length) {
    std::copy_n(ring_k + slot * dim, length * dim, keys + done * dim);
    std::copy_n(ring_v + slot * dim, length * dim, values + done * dim);
  });
  copy_rows(new_k, stride, keys + old * dim, dim, end - begin, dim);
  copy_rows(new_v, stride, values + old * dim, dim, end - begin, dim);
  const int64_t kept = std::max(begin, end - window);
  each_run(window, kept, end - kept, [&](int64_t slot, int64_t done, int64_t length) {
    const int64_t from = (kept - first + done) * dim;
    std::copy_n(keys + from, length * dim, ring_k + slot * dim);
    std::copy_n(values + from, length * dim, ring_v + slot * dim);
  });
  rotate_back(call, mixer, b, near.first_leaving, valid, keys,
              leaving_k + near.first_leaving * dim);
  near.keys = keys_at(keys, values, dim, old + end - begin);
  near.first = sinks + first;
  return near;
}

// Undoes the rotation of the keys that leave the window at steps [from, to) of sequence b.
template <class T>
void Engine<T>::rotate_back(const Call& call, const MixerWeights& mixer, size_t b, int64_t from,
                            int64_t to, const T* keys, T* out) {
  if (mixer.far.features == 0) return;
  const Tables& turn = tables(call, {0, mixer.window, 0});
  const int64_t half = shape_.head_dim / 2;
  const int64_t at = (static_cast<int64_t>(b) * call.span.tokens + from) * half;
  rotate(call.level, 1, keys, 2 * half, turn.cos.data() + at, turn.sin.data() + at, out, 2 * half,
         to - from, 1, half);
}

template class Engine<float>;
template class Engine<bf16>;

}  // namespace respike
