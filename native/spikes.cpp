// Linear layers behind neurons: by events here, by dense products in spikes_dense.cpp.
//
// For each row of counts the inputs that fired are listed once; every thread then walks that list
// with its share of the tiles, and reads the weights of no other input. Tiles of several matrices
// that lie side by side (respike.ops.packed.place_side_by_side) make long rows of memory, and only
// these are worth skipping: the processor fetches lines around a short one anyway.
#include "spikes.hpp"

#include <stdexcept>

#include "pool.hpp"
#include "spikes_vec.hpp"

namespace respike {

using std::int64_t;

namespace {

constexpr int64_t serial_work = 1 << 16;  // weights; fewer are not worth waking a thread
constexpr int64_t most_ahead = 32;        // events from use to what is prefetched

// The inputs of one row that fired, in order.
struct Events {
  std::vector<int64_t> row;          // where an input's weights begin in a tile, in bytes; then the
                                     // last again, for those who look ahead
  std::vector<std::int32_t> count;
  std::vector<int64_t> start;        // of each scale group, in events; one more at the end
  std::vector<std::uint8_t> beyond;  // groups with a count beyond most_count
};

// A thread's share of the tiles.
struct Tiles {
  std::vector<const std::uint8_t*> rows;
  std::vector<const std::uint16_t*> scales;
  int64_t scales_row;
  int64_t batch;  // events that go through all tiles together
  int64_t ahead;
};

std::int32_t pair(std::int32_t low, std::int32_t high) {
  return static_cast<std::int32_t>((static_cast<std::uint32_t>(high) << 16) |
                                   (static_cast<std::uint32_t>(low) & 0xffffu));
}

void prefetch([[maybe_unused]] const void* row) {
#if defined(__GNUC__)
  __builtin_prefetch(row, 0, 3);
#endif
}

void list_events(const std::int32_t* counts, const PackedWeights& w, Events& events) {
  const auto inputs = static_cast<std::size_t>(w.inputs);
  const int64_t groups = groups_of(w);
  events.row.resize(inputs + most_ahead + 1);
  events.count.resize(inputs);
  events.start.assign(static_cast<std::size_t>(groups) + 1, 0);
  events.beyond.assign(static_cast<std::size_t>(groups), 0);
  std::size_t found = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t end = std::min(w.inputs, (g + 1) * w.group);
    bool beyond = false;
    for (int64_t i = g * w.group; i < end; ++i) {  // without branches: silence is not predictable
      events.row[found] = i * w.strides.row;
      events.count[found] = counts[i];
      found += counts[i] != 0;
      beyond |= is_beyond(counts[i]);
    }
    events.start[static_cast<std::size_t>(g) + 1] = static_cast<int64_t>(found);
    events.beyond[static_cast<std::size_t>(g)] = beyond;
  }
  const int64_t last = found > 0 ? events.row[found - 1] : 0;
  std::fill_n(events.row.begin() + static_cast<std::ptrdiff_t>(found), most_ahead + 1, last);
}

// The same as EventSums for counts of any size.
template <class Kind>
void add_beyond(const std::uint8_t* rows, const Events& events, int64_t from, int64_t to,
                const std::uint16_t* scales, float* sums) {
  for (int c = 0; c < tile_width; ++c) {
    int64_t sum = 0;
    for (int64_t j = from; j < to; ++j) {
      const auto at = static_cast<std::size_t>(j);
      sum += static_cast<int64_t>(integer_at(Kind{}, rows + events.row[at], c)) * events.count[at];
    }
    sums[c] += static_cast<float>(sum) * half_to_float(scales[c]);
  }
}

}  // namespace
}  // namespace respike

#define RESPIKE_KERNELS "spikes_kernels.inc"
#include "each_level.hpp"

namespace respike {
namespace {

using AddEvents = void (*)(const Tiles&, const Events&, int64_t, std::int32_t*, float*);

template <class Kind>
AddEvents kernel_of([[maybe_unused]] Level level) {
#if RESPIKE_X86
  if (level >= Level::avx512) return avx512::add_events<Kind>;
  if (level >= Level::avx2) return avx2::add_events<Kind>;
#endif
  return portable::add_events<Kind>;
}

int64_t row_bytes(Kind kind) {
  return kind == Kind::int8 ? WeightInt8::row_bytes : WeightInt4::row_bytes;
}

// Tiles [from, to) of all jobs, one after the other.
template <class T>
Tiles share_of(const PackedLinearJob<T>* jobs, int64_t count, int64_t from, int64_t to) {
  Tiles tiles;
  int64_t before = 0;
  for (int64_t j = 0; j < count; ++j) {
    const PackedWeights& w = jobs[j].weights;
    const int64_t here = tiles_of(w);
    for (int64_t t = std::max<int64_t>(from - before, 0); t < std::min(to - before, here); ++t) {
      tiles.rows.push_back(w.data + t * w.strides.tile);
      tiles.scales.push_back(w.scales + t * w.strides.scales_tile);
    }
    before += here;
  }
  const PackedWeights& w = jobs[0].weights;
  const int64_t part = (to - from) * row_bytes(w.kind);  // of a row of memory
  tiles.scales_row = w.strides.scales_row;
  tiles.batch = part < 512 ? 16 : 8;                     // both measured, see docs/log.md
  tiles.ahead = part < 512 ? most_ahead - 8 : part < 2048 ? 16 : 8;
  return tiles;
}

// Outputs of tiles [from, to) of all jobs, of their sums (rows, to - from, 64).
template <class T>
void put_share(const Fired& fired, const PackedLinearJob<T>* jobs, int64_t count, int64_t from,
               int64_t to, const float* sums) {
  int64_t before = 0;  // tiles of the jobs before
  for (int64_t j = 0; j < count; ++j) {
    const PackedWeights& w = jobs[j].weights;
    const int64_t here = tiles_of(w);
    for (int64_t t = std::max<int64_t>(from - before, 0); t < std::min(to - before, here); ++t) {
      const int64_t column = t * tile_width;
      for (int64_t m = 0; m < fired.rows; ++m) {
        put_outputs(sums + (m * (to - from) + before + t - from) * tile_width, fired.steps[m],
                    w.bias == nullptr ? nullptr : w.bias + column,
                    std::min<int64_t>(tile_width, w.outputs - column),
                    jobs[j].out + m * jobs[j].out_stride + column);
      }
    }
    before += here;
  }
}

template <class T>
void event_spike_linears(Level level, int threads, const Fired& fired,
                         const PackedLinearJob<T>* jobs, int64_t count) {
  const PackedWeights& first = jobs[0].weights;
  const bool bytes = first.kind == Kind::int8;
  const AddEvents add_events = bytes ? kernel_of<WeightInt8>(level) : kernel_of<WeightInt4>(level);
  int64_t tiles = 0;
  for (int64_t j = 0; j < count; ++j) tiles += tiles_of(jobs[j].weights);
  thread_local std::vector<Events> kept;  // the next call needs as much again
  if (static_cast<int64_t>(kept.size()) < fired.rows) {
    kept.resize(static_cast<std::size_t>(fired.rows));
  }
  const Events* const events = kept.data();
  int64_t work = 0;
  for (int64_t m = 0; m < fired.rows; ++m) {
    list_events(fired.counts + m * first.inputs, first, kept[static_cast<std::size_t>(m)]);
    work += events[m].start.back() * tiles * tile_width;
  }
  threads = work < serial_work ? 1 : std::clamp(threads, 1, max_threads);
  const int64_t parts = std::min<int64_t>(threads, tiles);
  parallel_for(threads, parts, [&](int64_t index, int) {
    const int64_t from = index * tiles / parts, to = (index + 1) * tiles / parts;
    const Tiles mine = share_of(jobs, count, from, to);
    thread_local std::vector<float> sums;
    thread_local std::vector<std::int32_t> scratch;
    const int64_t width = (to - from) * tile_width;
    sums.assign(static_cast<std::size_t>(width * fired.rows), 0.0f);
    scratch.resize(std::max(scratch.size(), static_cast<std::size_t>(width)));
    const int64_t soon = fired.rows > 0 ? std::min(mine.ahead, events[0].start.back()) : 0;
    for (int64_t j = 0; j < soon; ++j) {
      for (const std::uint8_t* rows : mine.rows) prefetch(rows + events[0].row[j]);
    }
    for (const std::uint16_t* scales : mine.scales) {
      prefetch(scales);
      prefetch(scales + tile_width / 2);
    }
    for (int64_t g = 0; g < groups_of(first); ++g) {
      for (int64_t m = 0; m < fired.rows; ++m) {
        add_events(mine, events[m], g, scratch.data(), sums.data() + m * width);
      }
    }
    put_share(fired, jobs, count, from, to, sums.data());
  });
}

template <class T>
void check(const PackedLinearJob<T>* jobs, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    const PackedWeights &w = jobs[j].weights, &first = jobs[0].weights;
    if (w.kind != Kind::int8 && w.kind != Kind::int4) {
      throw std::invalid_argument("spike counts need weights of integers");
    }
    if (w.inputs != first.inputs || w.group != first.group || w.kind != first.kind) {
      throw std::invalid_argument("matrices behind the same neurons differ in their inputs");
    }
  }
}

bool is_few(const Fired& fired, int64_t inputs) {
  if (fired.rows > 16 * event_rows) return false;
  const auto silent = std::count(fired.counts, fired.counts + fired.rows * inputs, 0);
  return fired.rows * inputs - silent <= event_rows * inputs;
}

bool side_by_side(const PackedWeights& a, const PackedWeights& b) {
  return a.strides.row == b.strides.row && a.strides.scales_row == b.strides.scales_row;
}

}  // namespace

template <class T>
void spike_linears(Level level, int threads, const Fired& fired, const PackedLinearJob<T>* jobs,
                   int64_t count, SpikeForm form) {
  check(jobs, count);
  const bool best_by_events = form == SpikeForm::best && is_few(fired, jobs[0].weights.inputs);
  if (best_by_events || form == SpikeForm::events) {
    for (int64_t from = 0, to = 1; from < count; from = to++) {
      while (to < count && side_by_side(jobs[from].weights, jobs[to].weights)) ++to;
      event_spike_linears(level, threads, fired, jobs + from, to - from);
    }
    return;
  }
  dense_spike_linears(level, threads, fired, jobs, count);
  const int64_t inputs = jobs[0].weights.inputs;
  for (int64_t m = 0; m < fired.rows; ++m) {
    const std::int32_t* counts = fired.counts + m * inputs;
    if (std::none_of(counts, counts + inputs, is_beyond)) continue;
    std::vector<PackedLinearJob<T>> row(jobs, jobs + count);
    for (PackedLinearJob<T>& job : row) job.out += m * job.out_stride;
    spike_linears(level, threads, {counts, fired.steps + m, 1}, row.data(), count,
                  SpikeForm::events);
  }
}

template void spike_linears(Level, int, const Fired&, const PackedLinearJob<float>*, int64_t,
                            SpikeForm);
template void spike_linears(Level, int, const Fired&, const PackedLinearJob<bf16>*, int64_t,
                            SpikeForm);

}  // namespace respike
