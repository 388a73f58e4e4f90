// Python bindings of the engine. Addresses come in tuples; respike.models.engine keeps what they
// point to alive, and checks shapes and dtypes.
#include "engine_module.hpp"

#include <nanobind/stl/array.h>
#include <nanobind/stl/vector.h>

#include <utility>

#include "engine.hpp"
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

// Whether the threshold is max|x| / 127, k, address and number of bands.
respike::Neurons neurons(nb::handle item) {
  const auto n = nb::cast<nb::tuple>(item);
  return {nb::cast<bool>(n[0]), nb::cast<float>(n[1]), pointer<const float>(n[2]),
          nb::cast<int64_t>(n[3])};
}

respike::LayerNeurons layer_neurons(nb::handle item) {
  const auto sites = nb::cast<nb::tuple>(item);
  if (sites.size() == 0) return {};
  return {true, neurons(sites[0]), neurons(sites[1]), neurons(sites[2]), neurons(sites[3])};
}

respike::MixerWeights mixer(nb::handle item) {
  const auto m = nb::cast<nb::tuple>(item);
  const auto far = nb::cast<nb::tuple>(m[4]);
  return {nb::cast<std::vector<int64_t>>(m[0]),
          nb::cast<int64_t>(m[1]),
          nb::cast<int64_t>(m[2]),
          nb::cast<int64_t>(m[3]),
          {pointer<const float>(far[0]), pointer<const float>(far[1]), pointer<const float>(far[2]),
           pointer<const float>(far[3]), pointer<const float>(far[4]), nb::cast<int64_t>(far[5]),
           pointer<const float>(far[6]), pointer<const float>(far[7]), nb::cast<int64_t>(far[8])},
          m[5].is_none() ? nullptr : nb::cast<const respike::BlockTurns*>(m[5]),
          block_rule(nb::cast<BlockRuleNumbers>(m[6]))};
}

template <class T>
respike::LayerWeights<T> layer(nb::handle item) {
  const auto l = nb::cast<nb::tuple>(item);
  respike::LayerWeights<T> made{pointer<const T>(l[0]), pointer<const T>(l[1]),
                                pointer<const T>(l[2]), pointer<const T>(l[3]),
                                packed_weights(l[4]),   packed_weights(l[5]),
                                packed_weights(l[6]),   packed_weights(l[7]),
                                packed_weights(l[8]),   packed_weights(l[9]),
                                packed_weights(l[10]),  layer_neurons(l[11]),
                                {}};
  for (nb::handle part : nb::cast<nb::tuple>(l[12])) made.mixers.push_back(mixer(part));
  return made;
}

template <class T>
respike::Workspace<T> workspace(const nb::tuple& a) {
  return {pointer<T>(a[0]), pointer<T>(a[1]), pointer<T>(a[2]),
          pointer<T>(a[3]), pointer<T>(a[4]), pointer<T>(a[5])};
}

using Counts = std::vector<int64_t>;

template <class T>
using Step = void (respike::Engine<T>::*)(respike::Level, int, const respike::EngineSpan&,
                                          const respike::Workspace<T>&, std::size_t);

// `step` of one layer.
template <class T, Step<T> step>
void one_step(respike::Engine<T>& engine, int level, int threads, Counts start, Counts valid,
              int64_t tokens, const nb::tuple& work, std::size_t layer) {
  const respike::EngineSpan span{std::move(start), std::move(valid), tokens};
  const auto space = workspace<T>(work);
  const nb::gil_scoped_release unlocked;
  (engine.*step)(respike::checked_level(level), threads, span, space, layer);
}

template <class T>
void bind(nb::module_& m, const char* name) {
  using Engine = respike::Engine<T>;
  nb::class_<Engine>(m, name)
      .def(
          "__init__",
          [](Engine* self, int64_t hidden, int64_t heads, int64_t groups, int64_t head_dim,
             int64_t intermediate, float eps, const std::vector<double>& frequencies,
             bool rounded, const nb::tuple& layers) {
            std::vector<respike::LayerWeights<T>> made;
            for (nb::handle item : layers) made.push_back(layer<T>(item));
            new (self) Engine({hidden, heads, groups, head_dim, intermediate, eps, frequencies},
                              rounded ? respike::Activations::int8 : respike::Activations::exact,
                              std::move(made));
          },
          "hidden"_a, "heads"_a, "groups"_a, "head_dim"_a, "intermediate"_a, "eps"_a,
          "frequencies"_a, "rounded"_a, "layers"_a)
      .def(
          "run",
          [](Engine& self, int level, int threads, Counts start, Counts valid, int64_t tokens,
             const nb::tuple& work, std::size_t first, std::size_t last, const Counts& buffers) {
            std::vector<respike::MixerBuffers<T>> states;
            for (std::size_t i = 0; i + 10 < buffers.size(); i += 11) {
              const int64_t* each = buffers.data() + i;
              states.push_back({reinterpret_cast<T*>(each[0]), reinterpret_cast<T*>(each[1]),
                                each[2], reinterpret_cast<float*>(each[3]),
                                reinterpret_cast<T*>(each[4]), reinterpret_cast<T*>(each[5]),
                                reinterpret_cast<T*>(each[6]), reinterpret_cast<float*>(each[7]),
                                reinterpret_cast<int64_t*>(each[8]), reinterpret_cast<T*>(each[9]),
                                each[10]});
            }
            const respike::EngineSpan span{std::move(start), std::move(valid), tokens};
            const auto space = workspace<T>(work);
            const nb::gil_scoped_release unlocked;
            self.run(respike::checked_level(level), threads, span, space, first, last, states);
          },
          "level"_a, "threads"_a, "start"_a, "valid"_a, "tokens"_a, "work"_a, "first"_a, "last"_a,
          "buffers"_a, "x after layers [first, last).")
      .def("project", one_step<T, &Engine::project>, "level"_a, "threads"_a, "start"_a, "valid"_a,
           "tokens"_a, "work"_a, "layer"_a)
      .def("finish", one_step<T, &Engine::finish>, "level"_a, "threads"_a, "start"_a, "valid"_a,
           "tokens"_a, "work"_a, "layer"_a);
}

}  // namespace

void bind_engine(nb::module_& m) {
  bind<float>(m, "Engine_f32");
  bind<respike::bf16>(m, "Engine_bf16");
}
