// Neurons, and linear layers fed with what they fire. The definitions are respike.ops.spikes and
// respike.ops.spike_linear; all that is here follows them to the bit: sums of a scale group are
// integers, and float32 is added and multiplied one by one (these files are compiled without
// contraction to fma).
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.hpp"

namespace respike {

// Those in front of a layer, see respike.layers.spikes.Neuron.
struct Neurons {
  bool absmax;         // threshold max|x| / 127; else mean|x| / k
  float k;
  const float* bands;  // silent below, in units of mean|x|; null: none
  std::int64_t count;  // of bands: 1, or one for each input
};

// What rows of neurons fired.
struct Fired {
  const std::int32_t* counts;  // (rows, inputs)
  const float* steps;          // (rows)
  std::int64_t rows;
};

// counts (rows, inputs) and steps (rows) of x (rows, inputs).
template <class T>
void fire(Level level, int threads, const T* x, std::int64_t rows, std::int64_t inputs,
          const Neurons& neurons, std::int32_t* counts, float* steps);

// How a product runs. The bits are the same. events: rows walk the weights of what fired, one after
// the other, and read no others. dense: dot products of int8 over all inputs. best: by events if few
// inputs of all rows fired.
enum class SpikeForm { best = 0, events = 1, dense = 2 };

// out (rows, outputs) = round(steps * (counts @ weights) + bias) for each job, of integer weights in
// groups of the same size.
template <class T>
void spike_linears(Level level, int threads, const Fired& fired, const PackedLinearJob<T>* jobs,
                   std::int64_t count, SpikeForm form);

// ---- between their files

constexpr std::int64_t event_rows = 4;      // rows of which everything fired that take as long by
                                            // events as many take dense (measured)
constexpr std::int32_t most_count = 32767;  // of larger counts, a group's sums may not fit int32
inline bool is_beyond(std::int32_t count) { return count > most_count || count < -most_count; }

inline std::int64_t groups_of(const PackedWeights& w) { return (w.inputs + w.group - 1) / w.group; }
inline std::int64_t tiles_of(const PackedWeights& w) {
  return (w.outputs + tile_width - 1) / tile_width;
}

// As spike_linears, for counts within most_count; rows with others come out as anything.
template <class T>
void dense_spike_linears(Level level, int threads, const Fired& fired,
                         const PackedLinearJob<T>* jobs, std::int64_t count);

// Sums (64) of a tile of which `outputs` are no padding, as outputs of a row with this threshold.
template <class T>
inline void put_outputs(const float* sums, float step, const float* bias, std::int64_t outputs,
                        T* out) {
  for (std::int64_t c = 0; c < outputs; ++c) {
    const float value = sums[c] * step;
    store(out + c, bias == nullptr ? value : value + bias[c]);
  }
}

// The weight of a row in output `column`, before scaling.
inline std::int32_t integer_at(WeightInt8, const std::uint8_t* row, int column) {
  return static_cast<std::int8_t>(row[column]);
}
inline std::int32_t integer_at(WeightInt4, const std::uint8_t* row, int column) {
  const std::int32_t nibble = column < 32 ? row[column] & 15 : row[column - 32] >> 4;
  return nibble - 2 * (nibble & 8);
}

}  // namespace respike
