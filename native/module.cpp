// Python bindings and nothing else. Tensors arrive as addresses (torch's data_ptr()), because this
// module does not link against torch; respike.ops checks shape, dtype and contiguity before.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>

#include "kernels.hpp"

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
      "The highest level this processor can run: portable, avx2 or avx512.");

  def_both(m, "rms_norm", &rms_norm<float>, &rms_norm<respike::bf16>, "level"_a, "x"_a, "weight"_a,
           "out"_a, "rows"_a, "cols"_a, "eps"_a);
}
