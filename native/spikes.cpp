// Event-driven linear layers. The definition is respike.ops.spike_linear.spike_linear_definition,
// and what is here follows it to the bit: sums of a scale group are integers, and float32 is added
// and multiplied one by one (this file is compiled without contraction to fma).
//
// For each row of counts the inputs that fired are listed once; every tile of outputs then walks
// that list and reads the weights of no other input. Tiles are shared out over threads.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "kernels.hpp"
#include "pool.hpp"
#include "spikes.hpp"
#include "spikes_vec.hpp"

namespace respike {

using std::int64_t;

namespace {

constexpr int64_t serial_work = 1 << 16;  // weights; fewer are not worth waking a thread
constexpr int64_t ahead = 32;             // events from use to what is prefetched
constexpr int64_t most_count = 32767;     // counts beyond it are summed in int64, one by one

// The inputs of one row that fired, in order.
struct Events {
  std::vector<int64_t> row;           // where an input's weights begin in a tile, in bytes
  std::vector<int64_t> soon;          // the same of the event that is `ahead`, maybe tiles further
  std::vector<std::int32_t> count;
  std::vector<int64_t> start;         // of each scale group, in events; one more at the end
  std::vector<std::uint8_t> beyond;   // groups with a count beyond most_count
};

std::int32_t pair(std::int32_t low, std::int32_t high) {
  return static_cast<std::int32_t>((static_cast<std::uint32_t>(high) << 16) |
                                   (static_cast<std::uint32_t>(low) & 0xffffu));
}

void prefetch([[maybe_unused]] const std::uint8_t* row) {
#if defined(__GNUC__)
  __builtin_prefetch(row, 0, 3);
#endif
}

void list_events(const std::int32_t* counts, const PackedWeights& w, int64_t row_bytes,
                 Events& events) {
  const auto inputs = static_cast<std::size_t>(w.inputs);
  const int64_t groups = (w.inputs + w.group - 1) / w.group;
  events.row.resize(inputs);
  events.count.resize(inputs);
  events.start.assign(static_cast<std::size_t>(groups) + 1, 0);
  events.beyond.assign(static_cast<std::size_t>(groups), 0);
  std::size_t found = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t end = std::min(w.inputs, (g + 1) * w.group);
    bool beyond = false;
    for (int64_t i = g * w.group; i < end; ++i) {  // without branches: silence is not predictable
      events.row[found] = i * row_bytes;
      events.count[found] = counts[i];
      found += counts[i] != 0;
      beyond |= counts[i] > most_count || counts[i] < -most_count;
    }
    events.start[static_cast<std::size_t>(g) + 1] = static_cast<int64_t>(found);
    events.beyond[static_cast<std::size_t>(g)] = beyond;
  }
  events.soon.resize(found);
  const int64_t tile_bytes = w.inputs * row_bytes;
  const auto count = static_cast<int64_t>(found);
  for (int64_t j = 0; j < count; ++j) {
    const int64_t then = j + ahead;
    events.soon[static_cast<std::size_t>(j)] =
        then / count * tile_bytes + events.row[static_cast<std::size_t>(then % count)];
  }
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

using AddEvents = void (*)(const Tile&, const Events&, float* sums);

template <class Kind>
AddEvents kernel_of([[maybe_unused]] Level level) {
#if RESPIKE_X86
  if (level >= Level::avx512) return avx512::add_events<Kind>;
  if (level >= Level::avx2) return avx2::add_events<Kind>;
#endif
  return portable::add_events<Kind>;
}

}  // namespace

void spike_linear(Level level, int threads, const std::int32_t* counts, const float* step,
                  const PackedWeights& w, float* out, int64_t rows) {
  if (w.kind != Kind::int8 && w.kind != Kind::int4) {
    throw std::invalid_argument("spike counts need weights of integers");
  }
  const bool bytes = w.kind == Kind::int8;
  const AddEvents add_events = bytes ? kernel_of<WeightInt8>(level) : kernel_of<WeightInt4>(level);
  const int64_t row_bytes = bytes ? WeightInt8::row_bytes : WeightInt4::row_bytes;
  const int64_t groups = (w.inputs + w.group - 1) / w.group;
  const int64_t tiles = (w.outputs + tile_width - 1) / tile_width;
  thread_local std::vector<Events> kept;  // the next call needs as much again
  if (static_cast<int64_t>(kept.size()) < rows) kept.resize(static_cast<std::size_t>(rows));
  Events* const events = kept.data();
  int64_t work = 0;
  for (int64_t m = 0; m < rows; ++m) {
    list_events(counts + m * w.inputs, w, row_bytes, events[m]);
    work += events[m].start.back() * w.outputs;
  }
  threads = work < serial_work ? 1 : std::clamp(threads, 1, max_threads);
  parallel_for(threads, tiles, [&](int64_t index, int) {
    const int64_t column = index * tile_width;
    Tile tile;
    tile.rows = w.data + index * w.inputs * row_bytes;
    tile.scales = w.scales + index * groups * tile_width;
    tile.outputs = std::min<int64_t>(tile_width, w.outputs - column);
    float sums[tile_width];
    for (int64_t m = 0; m < rows; ++m) {
      add_events(tile, events[m], sums);
      float* to = out + m * w.outputs + column;
      for (int64_t c = 0; c < tile.outputs; ++c) {
        const float value = sums[c] * step[m];
        to[c] = w.bias == nullptr ? value : value + w.bias[column + c];
      }
    }
  });
}

}  // namespace respike
