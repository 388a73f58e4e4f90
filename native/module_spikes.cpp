// Python bindings of neurons and of the layers behind them; respike.ops checks shapes and dtypes.
#include "module_spikes.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using std::int64_t;
using std::uintptr_t;

template <class T>
T* pointer(nb::handle address) {
  return reinterpret_cast<T*>(nb::cast<uintptr_t>(address));
}

template <class T>
void fire(int level, int threads, uintptr_t x, int64_t rows, int64_t inputs, bool absmax, float k,
          uintptr_t bands, int64_t num_bands, uintptr_t counts, uintptr_t steps) {
  const respike::Neurons neurons{absmax, k, reinterpret_cast<const float*>(bands), num_bands};
  respike::fire(respike::checked_level(level), threads, reinterpret_cast<const T*>(x), rows, inputs,
                neurons, reinterpret_cast<std::int32_t*>(counts),
                reinterpret_cast<float*>(steps));
}

void spike_linear(int level, int threads, int form, nb::handle weights, uintptr_t counts,
                  uintptr_t steps, uintptr_t out, int64_t rows) {
  const respike::PackedWeights w = packed_weights(weights);
  const respike::PackedLinearJob<float> job{w, reinterpret_cast<float*>(out), w.outputs};
  const respike::Fired fired{reinterpret_cast<const std::int32_t*>(counts),
                             reinterpret_cast<const float*>(steps), rows};
  const nb::gil_scoped_release unlocked;
  respike::spike_linears(respike::checked_level(level), threads, fired, &job, 1,
                         static_cast<respike::SpikeForm>(form));
}

}  // namespace

respike::PackedWeights packed_weights(nb::handle item) {
  const auto w = nb::cast<nb::tuple>(item);
  respike::PackedWeights made{static_cast<respike::Kind>(nb::cast<int>(w[0])),
                              pointer<const std::uint8_t>(w[1]),
                              pointer<const std::uint16_t>(w[2]),
                              pointer<const float>(w[3]),
                              nb::cast<int64_t>(w[4]),
                              nb::cast<int64_t>(w[5]),
                              nb::cast<int64_t>(w[6]),
                              {}};
  if (w.size() > 7) {
    made.strides = {nb::cast<int64_t>(w[7]), nb::cast<int64_t>(w[8]), nb::cast<int64_t>(w[9]),
                    nb::cast<int64_t>(w[10])};
  }
  return made;
}

void bind_spikes(nb::module_& m) {
  const auto fires = [&m](const char* name, auto function) {
    m.def(name, function, nb::call_guard<nb::gil_scoped_release>(), "level"_a, "threads"_a, "x"_a,
          "rows"_a, "inputs"_a, "absmax"_a, "k"_a, "bands"_a, "num_bands"_a, "counts"_a, "steps"_a);
  };
  fires("fire_f32", &fire<float>);
  fires("fire_bf16", &fire<respike::bf16>);
  m.def("spike_linear", &spike_linear, "level"_a, "threads"_a, "form"_a, "weights"_a, "counts"_a,
        "steps"_a, "out"_a, "rows"_a);
}
