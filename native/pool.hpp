// A small pool of threads of our own, for kernels only; tasks never touch Python.
//
// The caller takes part. Workers spin for some tens of microseconds after a job, because the next
// kernel of a model usually follows at once, and then sleep. A worker that wakes late is not
// waited for. Threads that ask while a job runs, and tasks that ask themselves, run serially.
#pragma once

#include <cstdint>

namespace respike {

namespace detail {
using Task = void (*)(const void* context, std::int64_t index, int slot);
void run(int threads, std::int64_t count, Task task, const void* context);
}  // namespace detail

constexpr int max_threads = 256;

// task(index, slot) for every index in [0, count), in any order, by at most `threads` threads;
// slot is in [0, threads) and no two tasks share one at a time. Tasks must not throw.
template <class F>
void parallel_for(int threads, std::int64_t count, const F& task) {
  detail::run(
      threads, count,
      [](const void* context, std::int64_t index, int slot) {
        (*static_cast<const F*>(context))(index, slot);
      },
      &task);
}

constexpr std::int64_t part_elements = 1 << 14;  // fewer are not worth another thread

// task(first, end) for parts of [0, rows), rows of `cols` elements each.
template <class F>
void each_part(int threads, std::int64_t rows, std::int64_t cols, const F& task) {
  const std::int64_t part = cols < part_elements ? part_elements / (cols < 1 ? 1 : cols) : 1;
  parallel_for(threads, (rows + part - 1) / part, [&](std::int64_t index, int) {
    const std::int64_t first = index * part;
    task(first, rows - first < part ? rows : first + part);
  });
}

// Workers alive in this process.
int pool_workers();

}  // namespace respike
