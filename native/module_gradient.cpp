// Python bindings of gradients and nothing else.
#include "module_gradient.hpp"

#include <nanobind/stl/array.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <string>
#include <vector>

#include "blocks_gradient.hpp"
#include "engine_module.hpp"
#include "far_gradient.hpp"
#include "module_far.hpp"
#include "module_kept.hpp"
#include "module_keys.hpp"
#include "recurrent_gradient.hpp"
#include "softmax_gradient.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using std::int64_t;
using std::uintptr_t;

template <class T>
T* at(uintptr_t start, int64_t index) {
  return start == 0 ? nullptr : reinterpret_cast<T*>(start) + index;
}

// queries: addresses of q, q_sink, out, log_mass, d_out, d_mass. found: of d_q, d_q_sink (or 0),
// d_k, d_v, and those of sinks (or 0). shape: sequences, groups, tokens, heads of a group, head_dim,
// value_dim. All but the keys contiguous.
template <class T>
void softmax_gradient(int level, int threads, const std::array<uintptr_t, 6>& queries,
                      const Cache& keys, const Cache& sinks,
                      const std::array<uintptr_t, 6>& found, const std::array<int64_t, 6>& shape,
                      int64_t first, int64_t start, int64_t window, float scale) {
  const auto [sequences, groups, tokens, heads, K, V] = shape;
  std::vector<respike::SoftmaxGradientJob<T>> jobs;
  for (int64_t b = 0; b < sequences; ++b) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t head = b * tokens * groups * heads + g * heads, group = b * groups + g;
      respike::SoftmaxGradientJob<T> job{};
      respike::SoftmaxJob<T>& f = job.forward;
      f = {at<const T>(queries[0], head * K), at<const T>(queries[1], head * K),
           groups * heads * K, keys_of<T>(sinks, b, g), keys_of<T>(keys, b, g), first, start,
           tokens, heads, K, V, window, scale, at<T>(queries[2], head * V), groups * heads * V,
           at<float>(queries[3], head), groups * heads};
      job.d_out = at<const T>(queries[4], head * V);
      job.d_mass = at<const float>(queries[5], head);
      job.d_q = at<T>(found[0], head * K);
      job.d_q_sink = at<T>(found[1], head * K);
      job.d_k = at<T>(found[2], group * f.keys.count * K);
      job.d_v = at<T>(found[3], group * f.keys.count * V);
      job.d_sink_k = at<T>(found[4], group * f.sinks.count * K);
      job.d_sink_v = at<T>(found[5], group * f.sinks.count * V);
      jobs.push_back(job);
    }
  }
  respike::softmax_gradient(respike::checked_level(level), threads, jobs.data(),
                            static_cast<int64_t>(jobs.size()));
}

// As far of module_recurrent.cpp, with the window's output as it was. found: addresses of the
// gradients of q, k, v, near, near_log_mass, and, float32 and for each sequence, of the prototypes.
template <class T>
void far_gradient(int level, int threads, uintptr_t q, uintptr_t k, uintptr_t v,
                  uintptr_t first_real, uintptr_t real, const std::array<uintptr_t, 5>& weights,
                  uintptr_t memory, uintptr_t near_log_mass, uintptr_t near, uintptr_t d_joint,
                  const std::array<uintptr_t, 10>& found,
                  const std::array<FarStrides, 3>& strides, const FarSizes& sizes,
                  int64_t features) {
  const auto [batch, tokens, heads, groups, K, V] = sizes;
  const auto forward = far_jobs<T>(q, k, v, first_real, real, weights, memory, near_log_mass, near,
                                   strides, sizes, features);
  std::vector<respike::FarGradientJob<T>> jobs;
  const int64_t each = heads / groups;
  for (const respike::FarJob<T>& f : forward) {
    const auto index = static_cast<int64_t>(jobs.size());
    const int64_t b = index / groups, g = index % groups, head = b * tokens * heads + g * each;
    const int64_t group = b * tokens * groups + g;
    respike::FarGradientJob<T> job{};
    job.forward = f;
    job.d_joint = at<const T>(d_joint, head * V);
    job.d_q = at<T>(found[0], head * K);
    job.d_k = at<T>(found[1], group * K);
    job.d_v = at<T>(found[2], group * V);
    job.d_near = at<T>(found[3], head * V);
    job.d_near_mass = at<float>(found[4], head);
    job.d_q_stride = heads * K;
    job.d_k_stride = groups * K;
    job.d_v_stride = groups * V;
    job.d_key_weight = at<float>(found[5], index * features * K);
    job.d_key_bias = at<float>(found[6], index * features);
    job.d_query_weight = at<float>(found[7], index * each * features * K);
    job.d_beta = at<float>(found[8], index * each);
    job.d_log_decay = at<float>(found[9], index);
    jobs.push_back(job);
  }
  respike::far_gradient(respike::checked_level(level), threads, jobs.data(),
                        static_cast<int64_t>(jobs.size()));
}

// As blocks of module.cpp, with addresses of q, out, log_mass, chosen and d_out as queries, and of
// d_q, d_k and d_v as found; words of chosen for each token.
template <class T>
void blocks_gradient(int level, int threads, const respike::BlockTurns& turns,
                     const BlockRuleNumbers& rule, const std::array<uintptr_t, 5>& queries,
                     const Cache& keys, const std::array<uintptr_t, 3>& found,
                     const std::array<int64_t, 5>& shape, const std::vector<int64_t>& start,
                     const std::vector<int64_t>& count, int64_t words, float scale) {
  const auto [groups, tokens, heads, K, V] = shape;
  std::vector<respike::BlocksGradientJob<T>> jobs;
  for (std::size_t row = 0; row < start.size(); ++row) {
    const auto b = static_cast<int64_t>(row);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t head = b * tokens * groups * heads + g * heads, group = b * groups + g;
      respike::BlocksGradientJob<T> job{};
      respike::BlocksJob<T>& f = job.forward;
      f.q = at<const T>(queries[0], head * K);
      f.q_stride = groups * heads * K;
      f.keys = keys_of<T>(keys, b, g);
      f.start = start[row];
      f.tokens = count[row];
      f.heads = heads;
      f.head_dim = K;
      f.value_dim = V;
      f.scale = scale;
      f.out = at<T>(queries[1], head * V);
      f.out_stride = groups * heads * V;
      f.log_mass = at<float>(queries[2], head);
      f.mass_stride = groups * heads;
      f.chosen = at<std::uint64_t>(queries[3], group * tokens * words);
      f.chosen_stride = words;
      job.d_out = at<const T>(queries[4], head * V);
      job.d_q = at<T>(found[0], head * K);
      job.d_k = at<T>(found[1], group * f.keys.count * K);
      job.d_v = at<T>(found[2], group * f.keys.count * V);
      jobs.push_back(job);
    }
  }
  respike::blocks_gradient(respike::checked_level(level), threads, block_rule(rule), turns,
                           jobs.data(), static_cast<int64_t>(jobs.size()));
}

// given: addresses of q, k, v, strength (0: gated linear attention), log_decay, state, and of the
// gradients of outputs and of the last state; found: of the gradients of the first six. float32,
// contiguous, (B, T, heads or groups, ...). sizes: B, T, H, G, K, V.
void recurrent_gradient(int level, int threads, const std::array<uintptr_t, 8>& given,
                        const std::array<uintptr_t, 6>& found, const std::array<int64_t, 6>& sizes,
                        bool per_channel, float scale) {
  const auto [batch, tokens, heads, groups, K, V] = sizes;
  const int64_t each = heads / groups, decays = per_channel ? K : 1;
  std::vector<respike::RecurrentGradientJob> jobs;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t head = b * tokens * heads + g * each, group = b * tokens * groups + g;
      const int64_t state = (b * groups + g) * K * V;
      const std::array<int64_t, 6> place{head * K, group * K, group * V, group, group * decays,
                                         state};
      const auto of = [&](int i) { return at<const float>(given[i], place[i]); };
      const auto to = [&](int i) { return at<float>(found[i], place[i]); };
      jobs.push_back({of(0), of(1), of(2), of(3), of(4), of(5), at<const float>(given[6], head * V),
                      at<const float>(given[7], state), to(0), to(1), to(2), to(3), to(4), to(5),
                      heads * K, groups * K, groups * V, groups, groups * decays, heads * V, tokens,
                      each, K, V, per_channel, scale});
    }
  }
  respike::recurrent_gradient(respike::checked_level(level), threads, jobs.data(),
                              static_cast<int64_t>(jobs.size()));
}

// As kept_jobs, mean not looked at. asked: addresses of the gradient of mean, and of delta; found: of
// those of q, k and v.
template <class T>
void attend_kept_gradient(int level, int threads, const std::array<uintptr_t, 7>& buffers,
                          const std::array<uintptr_t, 2>& asked,
                          const std::array<uintptr_t, 3>& found,
                          const std::array<int64_t, 6>& sizes, int64_t every, float scale) {
  std::vector<respike::KeptGradientJob<T>> jobs;
  for (const auto& f : kept_jobs<T>(buffers, sizes, every, scale)) {
    const int64_t query = f.q - at<const T>(buffers[0], 0), key = f.k - at<const T>(buffers[1], 0);
    jobs.push_back({f, at<const T>(asked[0], query), at<const float>(asked[1], query / f.dim),
                    at<T>(found[0], query), at<T>(found[1], key), at<T>(found[2], key)});
  }
  respike::kept_gradient(respike::checked_level(level), threads, jobs.data(),
                         static_cast<int64_t>(jobs.size()));
}

template <class T>
void bind(nb::module_& m, const std::string& suffix) {
  using unlocked = nb::call_guard<nb::gil_scoped_release>;
  m.def(("softmax_gradient" + suffix).c_str(), &softmax_gradient<T>, unlocked(), "level"_a,
        "threads"_a, "queries"_a, "keys"_a, "sinks"_a, "found"_a, "shape"_a, "first"_a, "start"_a,
        "window"_a, "scale"_a);
  m.def(("far_gradient" + suffix).c_str(), &far_gradient<T>, unlocked(), "level"_a, "threads"_a,
        "q"_a, "k"_a, "v"_a, "first_real"_a, "real"_a, "weights"_a, "memory"_a,
        "near_log_mass"_a, "near"_a, "d_joint"_a, "found"_a, "strides"_a, "sizes"_a, "features"_a);
  m.def(("blocks_gradient" + suffix).c_str(), &blocks_gradient<T>, unlocked(), "level"_a,
        "threads"_a, "turns"_a, "rule"_a, "queries"_a, "keys"_a, "found"_a, "shape"_a, "start"_a,
        "count"_a, "words"_a, "scale"_a);
  m.def(("attend_kept_gradient" + suffix).c_str(), &attend_kept_gradient<T>, unlocked(), "level"_a,
        "threads"_a, "buffers"_a, "asked"_a, "found"_a, "sizes"_a, "every"_a, "scale"_a);
}

}  // namespace

void bind_gradient(nb::module_& m) {
  bind<float>(m, "_f32");
  bind<respike::bf16>(m, "_bf16");
  m.def("recurrent_gradient_f32", &recurrent_gradient, nb::call_guard<nb::gil_scoped_release>(),
        "level"_a, "threads"_a, "given"_a, "found"_a, "sizes"_a, "per_channel"_a, "scale"_a);
}
