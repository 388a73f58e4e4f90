// Python bindings of recurrent.hpp and nothing else: batches of KV groups become jobs.
#include "module_recurrent.hpp"

#include <nanobind/stl/array.h>

#include <array>
#include <string>
#include <vector>

#include "keep.hpp"
#include "module_far.hpp"
#include "module_kept.hpp"
#include "recurrent.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using std::int64_t;
using std::uintptr_t;
using Three = std::array<int64_t, 3>;  // strides in elements: from row to row, token, group
using Six = std::array<int64_t, 6>;    // B, T, H, G, K, V

template <class T>
T* at(uintptr_t start, int64_t index) {
  return reinterpret_cast<T*>(start) + index;
}
template <class T>
T* at(uintptr_t start, const Three& strides, int64_t b, int64_t g) {
  return at<T>(start, b * strides[0] + g * strides[2]);
}

// What gla and delta share; the strides of q are those of its groups of heads.
template <class Job, class T>
Job job_at(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t log_decay, uintptr_t state,
           uintptr_t out, const std::array<Three, 4>& strides, const Six& sizes, float scale,
           int64_t b, int64_t g) {
  const auto& [batch, tokens, heads, groups, key_dim, value_dim] = sizes;
  Job job{};
  job.heads = heads / groups;
  job.q = at<const T>(q, strides[0], b, g);
  job.k = at<const T>(k, strides[1], b, g);
  job.v = at<const T>(v, strides[2], b, g);
  job.log_decay = at<const float>(log_decay, strides[3], b, g);
  job.q_stride = strides[0][1];
  job.k_stride = strides[1][1];
  job.v_stride = strides[2][1];
  job.decay_stride = strides[3][1];
  job.state = at<float>(state, (b * groups + g) * key_dim * value_dim);
  job.out = at<float>(out, (b * tokens * heads + g * job.heads) * value_dim);
  job.out_stride = heads * value_dim;
  job.tokens = tokens;
  job.key_dim = key_dim;
  job.value_dim = value_dim;
  job.scale = scale;
  (void)batch;
  return job;
}

template <class T>
void gla(int level, int threads, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t log_decay,
         uintptr_t state, uintptr_t out, const std::array<Three, 4>& strides, const Six& sizes,
         bool per_channel, float scale) {
  using Job = respike::GlaJob<T>;
  std::vector<Job> jobs;
  for (int64_t b = 0; b < sizes[0]; ++b) {
    for (int64_t g = 0; g < sizes[3]; ++g) {
      jobs.push_back(job_at<Job, T>(q, k, v, log_decay, state, out, strides, sizes, scale, b, g));
      jobs.back().per_channel = per_channel;
    }
  }
  respike::gla(respike::checked_level(level), threads, jobs.data(),
               static_cast<int64_t>(jobs.size()));
}

template <class T>
void delta(int level, int threads, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t strength,
           uintptr_t log_decay, uintptr_t state, uintptr_t out,
           const std::array<Three, 5>& strides, const Six& sizes, float scale) {
  using Job = respike::DeltaJob<T>;
  const std::array<Three, 4> others{strides[0], strides[1], strides[2], strides[4]};
  std::vector<Job> jobs;
  for (int64_t b = 0; b < sizes[0]; ++b) {
    for (int64_t g = 0; g < sizes[3]; ++g) {
      jobs.push_back(job_at<Job, T>(q, k, v, log_decay, state, out, others, sizes, scale, b, g));
      jobs.back().strength = at<const float>(strength, strides[3], b, g);
      jobs.back().strength_stride = strides[3][1];
    }
  }
  respike::delta(respike::checked_level(level), threads, jobs.data(),
                 static_cast<int64_t>(jobs.size()));
}

template <class T>
void far(int level, int threads, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t first_real,
         uintptr_t real, const std::array<uintptr_t, 5>& weights, uintptr_t memory,
         uintptr_t near_log_mass, uintptr_t near, const std::array<Three, 3>& strides,
         const Six& sizes, int64_t features) {
  const auto jobs = far_jobs<T>(q, k, v, first_real, real, weights, memory, near_log_mass, near,
                                strides, sizes, features);
  respike::far(respike::checked_level(level), threads, jobs.data(),
               static_cast<int64_t>(jobs.size()));
}

// Addresses of worth (B, T, G), start and valid (B, 2), worth and position of the held (B, G, M),
// and, to be filled, held (B, G, N + 1, M), until (B, G, M + T) and lost (B, T, G).
void keep(const std::array<uintptr_t, 7>& buffers, const std::array<int64_t, 4>& sizes,
          int64_t every, const Three& rule) {
  const auto& [batch, steps, groups, places] = sizes;
  const auto [worth, span, held_worth, held_position, held, until, lost] = buffers;
  const int64_t lists = (steps + every - 1) / every + 1;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t row = b * groups + g, first = b * steps * groups + g;
      respike::KeepJob job{};
      job.worth = at<const float>(worth, first);
      job.lost = at<int64_t>(lost, first);
      job.stride = groups;
      job.start = *at<const int64_t>(span, 2 * b);
      job.valid = *at<const int64_t>(span, 2 * b + 1);
      job.steps = steps;
      job.held_worth = at<const float>(held_worth, row * places);
      job.held_position = at<const int64_t>(held_position, row * places);
      job.places = places;
      job.held = at<int64_t>(held, row * lists * places);
      job.until = at<int64_t>(until, row * (places + steps));
      respike::keep({rule[0], rule[1], rule[2]}, job, every);
    }
  }
}

template <class T>
void attend_kept(int level, int threads, const std::array<uintptr_t, 7>& buffers,
                 const Six& sizes, int64_t every, float scale) {
  const auto jobs = kept_jobs<T>(buffers, sizes, every, scale);
  respike::kept_attention(respike::checked_level(level), threads, jobs.data(),
                          static_cast<int64_t>(jobs.size()));
}

template <class T>
void bind(nb::module_& m, const std::string& suffix) {
  using unlocked = nb::call_guard<nb::gil_scoped_release>;
  m.def(("gla" + suffix).c_str(), &gla<T>, unlocked(), "level"_a, "threads"_a, "q"_a, "k"_a,
        "v"_a, "log_decay"_a, "state"_a, "out"_a, "strides"_a, "sizes"_a, "per_channel"_a,
        "scale"_a);
  m.def(("delta" + suffix).c_str(), &delta<T>, unlocked(), "level"_a, "threads"_a, "q"_a, "k"_a,
        "v"_a, "strength"_a, "log_decay"_a, "state"_a, "out"_a, "strides"_a, "sizes"_a, "scale"_a);
  m.def(("far" + suffix).c_str(), &far<T>, unlocked(), "level"_a, "threads"_a, "q"_a, "k"_a,
        "v"_a, "first_real"_a, "real"_a, "weights"_a, "memory"_a, "near_log_mass"_a, "near"_a,
        "strides"_a, "sizes"_a, "features"_a);
  m.def(("attend_kept" + suffix).c_str(), &attend_kept<T>, unlocked(), "level"_a, "threads"_a,
        "buffers"_a, "sizes"_a, "every"_a, "scale"_a);
}

}  // namespace

void bind_recurrent(nb::module_& m) {
  m.def("keep", &keep, nb::call_guard<nb::gil_scoped_release>(), "buffers"_a, "sizes"_a, "every"_a,
        "rule"_a);
  bind<float>(m, "_f32");
  bind<respike::bf16>(m, "_bf16");
}
