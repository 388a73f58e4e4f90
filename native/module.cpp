// Python bindings and nothing else. Tensors arrive as addresses (torch's data_ptr()), because this
// module does not link against torch; respike.ops checks shape, dtype and contiguity before.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <utility>
#include <vector>

#include "blocks.hpp"
#include "engine_module.hpp"
#include "kernels.hpp"
#include "module_gradient.hpp"
#include "module_keys.hpp"
#include "module_recurrent.hpp"
#include "pool.hpp"
#include "softmax.hpp"
#include "module_spikes.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using std::int64_t;
using std::uintptr_t;

template <class T>
T* buffer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
void rms_norm(int level, int threads, uintptr_t x, uintptr_t weight, uintptr_t out, int64_t rows,
              int64_t cols, float eps) {
  respike::rms_norm(respike::checked_level(level), threads, buffer<const T>(x),
                    buffer<const T>(weight), buffer<T>(out), rows, cols, eps);
}

// Kind, addresses of data, scales and bias, outputs, group, address of out, out's stride.
using Matrix = std::tuple<int, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, uintptr_t, int64_t>;

template <class T>
void packed_linears(int level, int threads, uintptr_t x, int64_t rows, int64_t inputs,
                    const std::vector<Matrix>& matrices, bool rounded) {
  std::vector<respike::PackedLinearJob<T>> jobs;
  for (const auto& [kind, data, scales, bias, outputs, group, out, stride] : matrices) {
    const respike::PackedWeights weights{static_cast<respike::Kind>(kind),
                                         buffer<const std::uint8_t>(data),
                                         buffer<const std::uint16_t>(scales),
                                         buffer<const float>(bias),
                                         inputs,
                                         outputs,
                                         group,
                                         {}};
    jobs.push_back({weights, buffer<T>(out), stride});
  }
  respike::packed_linears(respike::checked_level(level), threads, buffer<const T>(x), rows,
                          jobs.data(), static_cast<int64_t>(jobs.size()),
                          rounded ? respike::Activations::int8 : respike::Activations::exact);
}

template <class T>
void add_rms_norm(int level, int threads, uintptr_t x, uintptr_t residual, uintptr_t weight,
                  uintptr_t sum, uintptr_t out, int64_t rows, int64_t cols, float eps) {
  respike::add_rms_norm(respike::checked_level(level), threads, buffer<const T>(x),
                        buffer<const T>(residual), buffer<const T>(weight), buffer<T>(sum),
                        buffer<T>(out), rows, cols, eps);
}

template <class T>
void swiglu(int level, int threads, uintptr_t gate, int64_t gate_stride, uintptr_t up,
            int64_t up_stride, uintptr_t out, int64_t rows, int64_t cols) {
  respike::swiglu(respike::checked_level(level), threads, buffer<const T>(gate), gate_stride,
                  buffer<const T>(up), up_stride, buffer<T>(out), rows, cols);
}

template <class T>
void rotate(int level, int threads, uintptr_t x, int64_t stride, uintptr_t cos, uintptr_t sin,
            uintptr_t out, int64_t out_stride, int64_t tokens, int64_t heads, int64_t half) {
  respike::rotate(respike::checked_level(level), threads, buffer<const T>(x), stride,
                  buffer<const float>(cos), buffer<const float>(sin), buffer<T>(out), out_stride,
                  tokens, heads, half);
}

// shape: sequences, groups, tokens, heads of a group, head_dim, value_dim; q and out contiguous.
template <class T, class E>
void softmax_jobs(int level, int threads, uintptr_t q, uintptr_t q_sink, const Cache& keys,
                  const Cache& sinks, uintptr_t out, uintptr_t log_mass,
                  const std::array<int64_t, 6>& shape, int64_t first, int64_t start,
                  int64_t window, float scale) {
  const auto [sequences, groups, tokens, heads, head_dim, value_dim] = shape;
  std::vector<respike::SoftmaxJob<T, E>> jobs;
  for (int64_t b = 0; b < sequences; ++b) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t head = b * tokens * groups * heads + g * heads;
      jobs.push_back({buffer<const T>(q) + head * head_dim,
                      buffer<const T>(q_sink) + head * head_dim, groups * heads * head_dim,
                      keys_of<E>(sinks, b, g), keys_of<E>(keys, b, g), first, start, tokens, heads,
                      head_dim, value_dim, window, scale, buffer<T>(out) + head * value_dim,
                      groups * heads * value_dim, buffer<float>(log_mass) + head,
                      groups * heads});
    }
  }
  respike::softmax(respike::checked_level(level), threads, jobs.data(),
                   static_cast<int64_t>(jobs.size()));
}


template <class T>
void softmax(bool int8, int level, int threads, uintptr_t q, uintptr_t q_sink, const Cache& keys,
             const Cache& sinks, uintptr_t out, uintptr_t log_mass,
             const std::array<int64_t, 6>& shape, int64_t first, int64_t start, int64_t window,
             float scale) {
  const auto run = int8 ? softmax_jobs<T, std::int8_t> : softmax_jobs<T, T>;
  run(level, threads, q, q_sink, keys, sinks, out, log_mass, shape, first, start, window, scale);
}

// Window, sinks, block, summary, top, reach of sinks and of blocks (none: -1), true tokens.
// shape: groups, tokens between sequences of q, heads of a group, head_dim, value_dim. Of sequence
// b, count[b] tokens from start[b] on; summaries: address, steps from sequence to sequence and from
// group to group; known: addresses of log_mass and chosen (or 0), words of chosen for each token.
template <class T, class E>
void blocks_jobs(int level, int threads, const respike::BlockTurns& turns, const BlockRuleNumbers& rule,
                 uintptr_t q, const Cache& keys, const std::array<int64_t, 3>& summaries,
                 uintptr_t out, const std::array<int64_t, 5>& shape,
                 const std::vector<int64_t>& start, const std::vector<int64_t>& count,
                 const std::array<int64_t, 3>& known, float scale) {
  const auto [groups, tokens, heads, head_dim, value_dim] = shape;
  std::vector<respike::BlocksJob<T, E>> jobs;
  for (std::size_t b = 0; b < start.size(); ++b) {
    const auto row = static_cast<int64_t>(b);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t head = row * tokens * groups * heads + g * heads;
      jobs.push_back({buffer<const T>(q) + head * head_dim, groups * heads * head_dim,
                      keys_of<E>(keys, row, g),
                      buffer<const T>(static_cast<uintptr_t>(summaries[0])) + row * summaries[1] +
                          g * summaries[2],
                      start[b], count[b], heads, head_dim, value_dim, scale,
                      buffer<T>(out) + head * value_dim, groups * heads * value_dim});
      if (known[0] == 0) continue;
      jobs.back().log_mass = buffer<float>(static_cast<uintptr_t>(known[0])) + head;
      jobs.back().mass_stride = groups * heads;
      jobs.back().chosen = buffer<std::uint64_t>(static_cast<uintptr_t>(known[1])) +
                           (row * groups + g) * tokens * known[2];
      jobs.back().chosen_stride = known[2];
    }
  }
  respike::blocks(respike::checked_level(level), threads, block_rule(rule), turns, jobs.data(),
                  static_cast<int64_t>(jobs.size()));
}

template <class T>
void blocks(bool int8, int level, int threads, const respike::BlockTurns& turns, const BlockRuleNumbers& rule,
            uintptr_t q, const Cache& keys, const std::array<int64_t, 3>& summaries, uintptr_t out,
            const std::array<int64_t, 5>& shape, const std::vector<int64_t>& start,
            const std::vector<int64_t>& count, const std::array<int64_t, 3>& known, float scale) {
  const auto run = int8 ? blocks_jobs<T, std::int8_t> : blocks_jobs<T, T>;
  run(level, threads, turns, rule, q, keys, summaries, out, shape, start, count, known, scale);
}

// Binds NAME_f32 and NAME_bf16; the GIL is released while they run.
template <class F32, class BF16, class... Extra>
void def_both(nb::module_& m, const std::string& name, F32 f32, BF16 b16, const Extra&... extra) {
  using unlocked = nb::call_guard<nb::gil_scoped_release>;
  m.def((name + "_f32").c_str(), f32, unlocked(), extra...);
  m.def((name + "_bf16").c_str(), b16, unlocked(), extra...);
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "respike's native kernels; called by respike.ops, never directly.";
  m.def("cpu_features", &respike::cpu_features, "Feature name to whether this processor has it.");
  m.def(
      "cpu_level", [] { return std::string(respike::level_name(respike::best_level())); },
      "The highest level this processor can run: portable, avx2, avx512, avx512bf16 or amx.");
  m.attr("amx_model") = static_cast<int>(respike::Level::amx_model);  // for tests

  def_both(m, "rms_norm", &rms_norm<float>, &rms_norm<respike::bf16>, "level"_a, "threads"_a, "x"_a,
           "weight"_a, "out"_a, "rows"_a, "cols"_a, "eps"_a);
  def_both(m, "packed_linears", &packed_linears<float>, &packed_linears<respike::bf16>, "level"_a,
           "threads"_a, "x"_a, "rows"_a, "inputs"_a, "matrices"_a, "rounded"_a);
  def_both(m, "add_rms_norm", &add_rms_norm<float>, &add_rms_norm<respike::bf16>, "level"_a,
           "threads"_a, "x"_a, "residual"_a, "weight"_a, "sum"_a, "out"_a, "rows"_a, "cols"_a,
           "eps"_a);
  def_both(m, "swiglu", &swiglu<float>, &swiglu<respike::bf16>, "level"_a, "threads"_a, "gate"_a,
           "gate_stride"_a, "up"_a, "up_stride"_a, "out"_a, "rows"_a, "cols"_a);
  def_both(m, "rotate", &rotate<float>, &rotate<respike::bf16>, "level"_a, "threads"_a, "x"_a,
           "stride"_a, "cos"_a, "sin"_a, "out"_a, "out_stride"_a, "tokens"_a, "heads"_a, "half"_a);
  bind_recurrent(m);
  bind_gradient(m);

  def_both(m, "softmax", &softmax<float>, &softmax<respike::bf16>, "int8"_a, "level"_a, "threads"_a,
           "q"_a, "q_sink"_a, "keys"_a, "sinks"_a, "out"_a, "log_mass"_a, "shape"_a, "first"_a,
           "start"_a, "window"_a, "scale"_a);

  nb::class_<respike::BlockTurns>(m, "BlockTurns", "Rotary angles of a rule of `blocks`.")
      .def(
          "__init__",
          [](respike::BlockTurns* turns, const BlockRuleNumbers& rule, const std::vector<double>& radians) {
            new (turns) respike::BlockTurns(block_rule(rule), radians.data(),
                                            static_cast<int64_t>(radians.size()));
          },
          "rule"_a, "frequencies"_a);
  def_both(m, "blocks", &blocks<float>, &blocks<respike::bf16>, "int8"_a, "level"_a, "threads"_a,
           "turns"_a, "rule"_a, "q"_a, "keys"_a, "summaries"_a, "out"_a, "shape"_a, "start"_a,
           "count"_a, "known"_a, "scale"_a);

  m.def(
      "search_int4_f32",
      [](int level, int threads, uintptr_t weights, int64_t rows, int64_t cols, int64_t group,
         uintptr_t steps, int64_t num_steps, uintptr_t integers, uintptr_t scales) {
        respike::search_int4(respike::checked_level(level), threads, buffer<const float>(weights),
                             rows, cols, group, buffer<const float>(steps), num_steps,
                             buffer<std::int8_t>(integers), buffer<std::uint16_t>(scales));
      },
      nb::call_guard<nb::gil_scoped_release>(), "level"_a, "threads"_a, "weights"_a, "rows"_a,
      "cols"_a, "group"_a, "steps"_a, "num_steps"_a, "integers"_a, "scales"_a);

  bind_spikes(m);

  m.def(
      "advise_huge_pages",
      [](uintptr_t start, std::size_t bytes) {
        return respike::advise_huge_pages(buffer<void>(start), bytes);
      },
      "start"_a, "bytes"_a, "Asks for huge pages under a buffer; whether the system agreed.");
  m.def(
      "read_all",
      [](uintptr_t start, int64_t words) {
        return respike::read_all(buffer<const std::uint64_t>(start), words);
      },
      nb::call_guard<nb::gil_scoped_release>(), "start"_a, "words"_a,
      "Exclusive or of 64-bit words: how fast can memory be read?");
  m.def("pool_workers", &respike::pool_workers, "Threads of the kernels' pool, the caller aside.");
  bind_engine(m);
}
