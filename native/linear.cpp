// Packed linear layers. The definition is respike.ops.linear.packed_linear_definition.
//
// Work is cut by tiles (and, for many rows of x, by blocks of rows), each done whole by one thread
// in a fixed order: the bits do not depend on the number of threads, nor on the other matrices of a
// call.
#include "linear.hpp"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "pool.hpp"

namespace respike {
namespace {

constexpr int64_t serial_work = 1 << 16;  // products; fewer are not worth waking a thread

int64_t bytes_per_row(Kind kind) {
  constexpr int64_t bytes[] = {WeightF32::row_bytes, WeightBF16::row_bytes, WeightInt8::row_bytes,
                               WeightInt4::row_bytes};
  return bytes[static_cast<int>(kind)];
}

int64_t tiles_of(const PackedWeights& w) { return (w.outputs + tile_width - 1) / tile_width; }
int64_t groups_of(const PackedWeights& w) { return (w.inputs + w.group - 1) / w.group; }

Tile tile_at(const PackedWeights& w, int64_t index) {
  const int64_t column = index * tile_width;
  Tile tile;
  tile.rows = w.data + index * w.inputs * bytes_per_row(w.kind);
  tile.scales = w.scales == nullptr ? nullptr : w.scales + index * groups_of(w) * tile_width;
  tile.bias = w.bias == nullptr ? nullptr : w.bias + column;
  tile.inputs = w.inputs;
  tile.group = w.group;
  tile.outputs = std::min<int64_t>(tile_width, w.outputs - column);
  return tile;
}

// Room for `elements` that start on a cache line; kept, because the next call needs it again.
template <class E>
E* room(std::vector<E>& kept, int64_t elements) {
  constexpr std::size_t line = 64 / sizeof(E);
  const auto size = static_cast<std::size_t>(elements) + line;
  if (kept.size() < size) kept.resize(size);
  const auto address = reinterpret_cast<std::uintptr_t>(kept.data());
  return reinterpret_cast<E*>((address + 63) / 64 * 64);
}

float* scratch(int64_t elements) {
  thread_local std::vector<float> kept;
  return room(kept, elements);
}

// ---- x in the forms that kernels read; only those that some matrix of the call needs are made

Rows<float> float_rows(int, const float* x, int64_t rows, int64_t inputs) {
  return {x, rows, inputs};
}
Rows<float> float_rows(int threads, const bf16* x, int64_t rows, int64_t inputs) {
  thread_local std::vector<float> kept;
  float* converted = room(kept, rows * inputs);
  each_part(threads, rows, inputs, [&](int64_t from, int64_t to) {
    for (int64_t i = from * inputs; i < to * inputs; ++i) converted[i] = load(x + i);
  });
  return {converted, rows, inputs};
}

// Pairs of inputs are read at once, so rows of odd length get a zero at their end.
Rows<bf16> even_rows(const bf16* x, int64_t rows, int64_t inputs) {
  if (inputs % 2 == 0) return {x, rows, inputs};
  thread_local std::vector<bf16> kept;
  kept.assign(static_cast<std::size_t>(rows * (inputs + 1)), bf16{0});
  for (int64_t m = 0; m < rows; ++m) {
    std::copy(x + m * inputs, x + (m + 1) * inputs, kept.data() + m * (inputs + 1));
  }
  return {kept.data(), rows, inputs + 1};
}
Rows<bf16> even_rows(const float*, int64_t, int64_t) { return {}; }  // never asked for

constexpr int group_sizes = 3;
int group_index(int64_t group) { return group == 32 ? 0 : group == 64 ? 1 : 2; }

template <class T>
RoundedRows rounded_rows(Level level, int threads, const T* x, int64_t rows,
                         const PackedWeights& w) {
  thread_local std::vector<std::int8_t> integers[group_sizes];
  thread_local std::vector<float> scales[group_sizes];
  thread_local std::vector<std::int32_t> totals[group_sizes];
  const int size = group_index(w.group);
  const int64_t groups = groups_of(w), stride = (w.inputs + 3) / 4 * 4;
  const RoundedRows out{room(integers[size], rows * stride), room(scales[size], rows * groups),
                        room(totals[size], rows * groups), rows, stride, groups};
  const RoundRow<T> round_row = round_row_kernel<T>(level);
  each_part(threads, rows, w.inputs, [&](int64_t from, int64_t to) {
    for (int64_t m = from; m < to; ++m) {
      round_row(x + m * w.inputs, w.inputs, w.group, out.x + m * stride, out.scales + m * groups,
                out.totals + m * groups);
    }
  });
  return out;
}

template <class T>
struct Forms {
  Rows<float> floats{};
  Rows<bf16> pairs{};
  RoundedRows rounded[group_sizes]{};
};

// Does the kernel for this kind of weights multiply x as bfloat16?
template <class T>
bool takes_pairs(Level level, Kind kind, int64_t rows) {
  return std::is_same_v<T, bf16> && rows > few && exact_kernels(level, kind).many_pairs != nullptr;
}

template <class T>
Forms<T> forms_for(Level level, int threads, const T* x, int64_t rows,
                   const PackedLinearJob<T>* jobs, int64_t count, Activations how) {
  Forms<T> forms;
  for (int64_t j = 0; j < count; ++j) {
    const PackedWeights& w = jobs[j].weights;
    RoundedRows& rounded = forms.rounded[group_index(w.group)];
    if (how == Activations::int8) {
      if (rounded.x == nullptr) rounded = rounded_rows(level, threads, x, rows, w);
    } else if (takes_pairs<T>(level, w.kind, rows)) {
      if (forms.pairs.x == nullptr) forms.pairs = even_rows(x, rows, w.inputs);
    } else if (forms.floats.x == nullptr) {
      forms.floats = float_rows(threads, x, rows, w.inputs);
    }
  }
  return forms;
}

template <class X>
Rows<X> part_of(const Rows<X>& all, int64_t from, int64_t to) {
  return {all.x + from * all.stride, to - from, all.stride};
}
RoundedRows part_of(const RoundedRows& all, int64_t from, int64_t to) {
  RoundedRows part = all.at(from, 0, 0);
  part.count = to - from;
  return part;
}

// sums (to - from, 64) = rows [from, to) of x times a tile.
template <class T>
void multiply_tile(Level level, Kind kind, const Tile& tile, const Forms<T>& forms, int64_t rows,
                   int64_t from, int64_t to, Activations how, float* sums, float* panel) {
  if (how == Activations::int8) {
    const RoundedRows& all = forms.rounded[group_index(tile.group)];
    return rounded_kernel(level, kind, rows)(tile, part_of(all, from, to), sums, panel);
  }
  const ExactKernels kernels = exact_kernels(level, kind);
  if (takes_pairs<T>(level, kind, rows)) {
    return kernels.many_pairs(tile, part_of(forms.pairs, from, to), sums, panel);
  }
  const auto kernel = rows > few ? kernels.many_rows : kernels.few_rows;
  kernel(tile, part_of(forms.floats, from, to), sums, panel);
}

template <class T>
void check(const PackedLinearJob<T>* jobs, int64_t count, Activations how) {
  for (int64_t j = 0; j < count; ++j) {
    const PackedWeights& w = jobs[j].weights;
    if (w.inputs != jobs[0].weights.inputs) {
      throw std::invalid_argument("matrices fed by the same x differ in their inputs");
    }
    if (how == Activations::int8 && w.scales == nullptr) {
      throw std::invalid_argument("int8 activations need weights with scales");
    }
  }
}

}  // namespace

template <class T>
void packed_linears(Level level, int threads, const T* x, int64_t rows,
                    const PackedLinearJob<T>* jobs, int64_t count, Activations how) {
  check(jobs, count, how);
  int64_t outputs = 0, tiles = 0;
  for (int64_t j = 0; j < count; ++j) {
    outputs += jobs[j].weights.outputs;
    tiles += tiles_of(jobs[j].weights);
  }
  if (rows == 0 || outputs == 0) return;
  const int64_t work = std::min(rows, few) * outputs * jobs[0].weights.inputs;
  threads = work < serial_work ? 1 : std::clamp(threads, 1, max_threads);

  const Forms<T> forms = forms_for(level, threads, x, rows, jobs, count, how);
  const Finish<T> finish = finish_kernel<T>(level);
  const int64_t row_blocks = (rows + block_rows - 1) / block_rows;
  const int64_t block = (rows + row_blocks - 1) / row_blocks;
  const int64_t each = (panel_depth + block) * tile_width;
  float* memory = scratch(each * threads);
  const auto one = [&](int64_t index, int slot) {
    int64_t at = index / row_blocks;
    const PackedLinearJob<T>* job = jobs;
    for (; at >= tiles_of(job->weights); ++job) at -= tiles_of(job->weights);
    const Tile tile = tile_at(job->weights, at);
    const int64_t from = index % row_blocks * block, to = std::min(from + block, rows);
    float* panel = memory + slot * each;
    float* sums = panel + panel_depth * tile_width;
    multiply_tile(level, job->weights.kind, tile, forms, rows, from, to, how, sums, panel);
    finish(tile, sums, to - from, job->out + from * job->out_stride + at * tile_width,
           job->out_stride);
  };
  if (rows > few) return parallel_for(threads, tiles * row_blocks, one);
  // Tiles side by side go to one thread: what it fetches ahead is then its own.
  const int64_t parts = std::min<int64_t>(threads, tiles);
  parallel_for(threads, parts, [&](int64_t part, int slot) {
    for (int64_t t = part * tiles / parts; t < (part + 1) * tiles / parts; ++t) one(t, slot);
  });
}

template void packed_linears(Level, int, const float*, int64_t, const PackedLinearJob<float>*,
                             int64_t, Activations);
template void packed_linears(Level, int, const bf16*, int64_t, const PackedLinearJob<bf16>*,
                             int64_t, Activations);

}  // namespace respike
