// Dense products of spike counts, for prefill: dot products of int8, and apart from them the few
// counts that do not fit, so that every sum is the integer that the events give.
//
// Cut as in linear.cpp: tiles and blocks of rows, each done whole by one thread.
#include <cstring>
#include <vector>

#include "amx.hpp"
#include "linear.hpp"
#include "pool.hpp"
#include "quads.hpp"
#include "spikes.hpp"

namespace respike {
namespace {

constexpr std::int32_t most_narrow = 127;

std::int32_t narrowed(std::int32_t count) { return std::clamp(count, -most_narrow, most_narrow); }

// What a count has beyond int8.
struct Outlier {
  std::int32_t input;
  std::int32_t rest;
};

template <class Kind>
struct CountRows {
  const std::int8_t* x;
  const std::int32_t* totals;
  const std::int32_t* first;  // (count, groups) and one more: where a group's outliers begin
  int64_t count;
  int64_t stride;
  int64_t groups;
  const Outlier* outliers;
  const std::uint8_t* weights;  // of the tile at hand
  int64_t row_bytes;

  CountRows at(int64_t row, int64_t input, int64_t group) const {
    CountRows from = *this;
    from.x += row * stride + input;
    from.totals += row * groups + group;
    from.first += row * groups + group;
    from.count -= row;
    return from;
  }
};

}  // namespace
}  // namespace respike

#define RESPIKE_KERNELS "spikes_dense.inc"
#include "each_level.hpp"

#if RESPIKE_X86
#define RESPIKE_LEVEL avx512bf16
#define RESPIKE_TARGET RESPIKE_AVX512BF16
#include "spikes_dense.inc"
#undef RESPIKE_LEVEL
#undef RESPIKE_TARGET
#endif

namespace respike {
namespace {

template <class Kind>
using Multiply = void (*)(const Tile&, int64_t, const CountRows<Kind>&, float*, float*);
using NarrowRow = void (*)(const std::int32_t*, int64_t, int64_t, std::int8_t*, std::int32_t*,
                           std::int32_t*);

template <class Kind>
Multiply<Kind> multiply_at([[maybe_unused]] Level level, [[maybe_unused]] int64_t rows) {
#if RESPIKE_X86
  if (level == Level::amx && rows > few) {
    return avx512bf16::multiply_counts<Kind, HardwareTiles<std::int8_t>>;
  }
  if (level == Level::amx_model && rows > few) {
    return avx512bf16::multiply_counts<Kind, ModelTiles<std::int8_t>>;
  }
  if (level >= Level::avx512bf16) return avx512bf16::multiply_counts<Kind>;
  if (level >= Level::avx512) return avx512::multiply_counts<Kind>;
  if (level >= Level::avx2) return avx2::multiply_counts<Kind>;
#endif
  return portable::multiply_counts<Kind>;
}

NarrowRow narrow_at([[maybe_unused]] Level level) {
#if RESPIKE_X86
  if (level >= Level::avx512bf16) return avx512bf16::narrow_row;
  if (level >= Level::avx512) return avx512::narrow_row;
  if (level >= Level::avx2) return avx2::narrow_row;
#endif
  return portable::narrow_row;
}

// Rows of counts in the form that kernels read.
struct NarrowRows {
  std::vector<std::int8_t> x;
  std::vector<std::int32_t> totals, first;
  std::vector<Outlier> outliers;
  int64_t stride, groups;

  void take(Level level, int threads, const Fired& fired, int64_t inputs, int64_t group) {
    stride = (inputs + 3) / 4 * 4;
    groups = (inputs + group - 1) / group;
    const auto cells = static_cast<std::size_t>(fired.rows * groups);
    x.resize(static_cast<std::size_t>(fired.rows * stride));
    totals.resize(cells);
    first.resize(cells + 1);
    const NarrowRow narrow = narrow_at(level);
    each_part(threads, fired.rows, inputs, [&](int64_t from, int64_t to) {
      for (int64_t m = from; m < to; ++m) {
        narrow(fired.counts + m * inputs, inputs, group, x.data() + m * stride,
               totals.data() + m * groups, first.data() + m * groups);
      }
    });
    outliers.clear();
    for (std::size_t cell = 0; cell < cells; ++cell) {
      const bool any = first[cell] > 0;
      first[cell] = static_cast<std::int32_t>(outliers.size());
      if (any) list(fired, static_cast<int64_t>(cell), inputs, group);
    }
    first[cells] = static_cast<std::int32_t>(outliers.size());
  }

  void list(const Fired& fired, int64_t cell, int64_t inputs, int64_t group) {
    const std::int32_t* counts = fired.counts + cell / groups * inputs;
    const int64_t from = cell % groups * group;
    for (int64_t i = from; i < std::min(from + group, inputs); ++i) {
      if (is_beyond(counts[i])) continue;  // its row is done again by events
      const std::int32_t rest = counts[i] - narrowed(counts[i]);
      if (rest != 0) outliers.push_back({static_cast<std::int32_t>(i), rest});
    }
  }
};

template <class Kind>
void multiply_block(Level level, const NarrowRows& rows, const PackedWeights& w, int64_t tile_index,
                    int64_t from, int64_t to, float* sums, float* panel) {
  Tile tile;
  tile.rows = w.data + tile_index * w.strides.tile;
  tile.scales = w.scales + tile_index * w.strides.scales_tile;
  tile.bias = nullptr;
  tile.inputs = w.inputs;
  tile.group = w.group;
  tile.outputs = tile_width;
  tile.scales_row = w.strides.scales_row;
  const CountRows<Kind> all{rows.x.data(), rows.totals.data(), rows.first.data(), to, rows.stride,
                            rows.groups,   rows.outliers.data(), tile.rows, w.strides.row};
  multiply_at<Kind>(level, to - from)(tile, w.strides.row, all.at(from, 0, 0), sums, panel);
}

}  // namespace

template <class T>
void dense_spike_linears(Level level, int threads, const Fired& fired,
                         const PackedLinearJob<T>* jobs, int64_t count) {
  int64_t tiles = 0;
  for (int64_t j = 0; j < count; ++j) tiles += tiles_of(jobs[j].weights);
  if (fired.rows == 0 || tiles == 0) return;
  thread_local NarrowRows kept;
  const PackedWeights& first = jobs[0].weights;
  kept.take(level, threads, fired, first.inputs, first.group);
  const NarrowRows& rows = kept;
  const int64_t row_blocks = (fired.rows + block_rows - 1) / block_rows;
  const int64_t block = (fired.rows + row_blocks - 1) / row_blocks;
  parallel_for(threads, tiles * row_blocks, [&](int64_t index, int) {
    thread_local std::vector<float> memory;
    memory.resize(static_cast<std::size_t>((panel_depth + block) * tile_width));
    float* const panel = memory.data();
    float* const sums = panel + panel_depth * tile_width;
    int64_t at = index / row_blocks;
    const PackedLinearJob<T>* job = jobs;
    for (; at >= tiles_of(job->weights); ++job) at -= tiles_of(job->weights);
    const PackedWeights& w = job->weights;
    const int64_t from = index % row_blocks * block, to = std::min(from + block, fired.rows);
    const auto multiply =
        w.kind == Kind::int8 ? multiply_block<WeightInt8> : multiply_block<WeightInt4>;
    multiply(level, rows, w, at, from, to, sums, panel);
    const int64_t column = at * tile_width;
    for (int64_t m = from; m < to; ++m) {
      put_outputs(sums + (m - from) * tile_width, fired.steps[m],
                  w.bias == nullptr ? nullptr : w.bias + column,
                  std::min<int64_t>(tile_width, w.outputs - column),
                  job->out + m * job->out_stride + column);
    }
  });
}

template void dense_spike_linears(Level, int, const Fired&, const PackedLinearJob<float>*, int64_t);
template void dense_spike_linears(Level, int, const Fired&, const PackedLinearJob<bf16>*, int64_t);

}  // namespace respike
