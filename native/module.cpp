// Python bindings and nothing else. Tensors arrive as addresses (torch's data_ptr()), because this
// module does not link against torch; respike.ops checks shape, dtype and contiguity before.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>

#include "kernels.hpp"
#include "pool.hpp"
#include "spikes.hpp"

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
void rms_norm(int level, uintptr_t x, uintptr_t weight, uintptr_t out, int64_t rows, int64_t cols,
              float eps) {
  respike::rms_norm(respike::checked_level(level), buffer<const T>(x), buffer<const T>(weight),
                    buffer<T>(out), rows, cols, eps);
}

template <class T>
void packed_linear(int level, int threads, int kind, uintptr_t data, uintptr_t scales, uintptr_t x,
                   uintptr_t bias, uintptr_t out, int64_t rows, int64_t inputs, int64_t outputs,
                   int64_t group) {
  const respike::PackedWeights weights{static_cast<respike::Kind>(kind),
                                       buffer<const std::uint8_t>(data),
                                       buffer<const std::uint16_t>(scales),
                                       buffer<const float>(bias),
                                       inputs,
                                       outputs,
                                       group};
  respike::packed_linear(respike::checked_level(level), threads, buffer<const T>(x), weights,
                         buffer<T>(out), rows);
}

void spike_linear(int level, int threads, int kind, uintptr_t data, uintptr_t scales,
                  uintptr_t counts, uintptr_t step, uintptr_t bias, uintptr_t out, int64_t rows,
                  int64_t inputs, int64_t outputs, int64_t group) {
  const respike::PackedWeights weights{static_cast<respike::Kind>(kind),
                                       buffer<const std::uint8_t>(data),
                                       buffer<const std::uint16_t>(scales),
                                       buffer<const float>(bias),
                                       inputs,
                                       outputs,
                                       group};
  respike::spike_linear(respike::checked_level(level), threads, buffer<const std::int32_t>(counts),
                        buffer<const float>(step), weights, buffer<float>(out), rows);
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
      "The highest level this processor can run: portable, avx2, avx512 or avx512bf16.");

  def_both(m, "rms_norm", &rms_norm<float>, &rms_norm<respike::bf16>, "level"_a, "x"_a, "weight"_a,
           "out"_a, "rows"_a, "cols"_a, "eps"_a);
  def_both(m, "packed_linear", &packed_linear<float>, &packed_linear<respike::bf16>, "level"_a,
           "threads"_a, "kind"_a, "data"_a, "scales"_a, "x"_a, "bias"_a, "out"_a, "rows"_a,
           "inputs"_a, "outputs"_a, "group"_a);
  def_both(m, "add_rms_norm", &add_rms_norm<float>, &add_rms_norm<respike::bf16>, "level"_a,
           "threads"_a, "x"_a, "residual"_a, "weight"_a, "sum"_a, "out"_a, "rows"_a, "cols"_a,
           "eps"_a);
  def_both(m, "swiglu", &swiglu<float>, &swiglu<respike::bf16>, "level"_a, "threads"_a, "gate"_a,
           "gate_stride"_a, "up"_a, "up_stride"_a, "out"_a, "rows"_a, "cols"_a);
  def_both(m, "rotate", &rotate<float>, &rotate<respike::bf16>, "level"_a, "threads"_a, "x"_a,
           "stride"_a, "cos"_a, "sin"_a, "out"_a, "out_stride"_a, "tokens"_a, "heads"_a, "half"_a);

  m.def("spike_linear", &spike_linear, nb::call_guard<nb::gil_scoped_release>(), "level"_a,
        "threads"_a, "kind"_a, "data"_a, "scales"_a, "counts"_a, "step"_a, "bias"_a, "out"_a,
        "rows"_a, "inputs"_a, "outputs"_a, "group"_a);

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
}
