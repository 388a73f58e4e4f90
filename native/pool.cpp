#include "pool.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#define RESPIKE_POSIX 1
#include <pthread.h>
#include <signal.h>
#else
#define RESPIKE_POSIX 0
#endif

namespace respike {
namespace {

using std::int64_t;
using std::uint64_t;

inline void relax() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_ia32_pause();
#endif
}

class Pool {
 public:
  void run(int threads, int64_t count, detail::Task task, const void* context);
  int workers() const { return workers_.load(); }

 private:
  // The gate says which job is open and who is in it: the job's number in the upper half, then how
  // many workers it wants (0: closed), then how many are in it now.
  static constexpr uint64_t job_unit = uint64_t{1} << 32;
  static constexpr uint64_t wanted_unit = uint64_t{1} << 16;
  static uint64_t job(uint64_t gate) { return gate / job_unit; }
  static int wanted(uint64_t gate) { return static_cast<int>(gate / wanted_unit % wanted_unit); }
  static uint64_t inside(uint64_t gate) { return gate % wanted_unit; }

  static constexpr int spins = 2000;

  void grow(int workers);
  void work(int index);
  uint64_t wait_for_job_after(uint64_t last);
  void take_tasks(int slot);

  std::mutex caller_;  // held by the thread whose job runs
  std::atomic<uint64_t> gate_{0};
  std::atomic<int> workers_{0};
  std::atomic<int> sleepers_{0};
  std::mutex sleep_;
  std::condition_variable wake_;

  // The job; written only while the gate is closed and nobody is inside.
  detail::Task task_ = nullptr;
  const void* context_ = nullptr;
  int64_t count_ = 0;
  alignas(64) std::atomic<int64_t> next_{0};
};

thread_local bool inside_job = false;

void Pool::grow(int workers) {
#if RESPIKE_POSIX
  sigset_t all, before;  // signals are for Python's threads, but for a crash of the thread's own
  sigfillset(&all);
  for (int own : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) sigdelset(&all, own);
  pthread_sigmask(SIG_SETMASK, &all, &before);
#endif
  try {
    while (workers_ < workers) {
      const int index = workers_;
      std::thread([this, index] { work(index); }).detach();
      ++workers_;
    }
  } catch (const std::system_error&) {
    // No more threads to be had: the job runs on those there are.
  }
#if RESPIKE_POSIX
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
#endif
}

uint64_t Pool::wait_for_job_after(uint64_t last) {
  for (int i = 0; i < spins; ++i) {
    const uint64_t gate = gate_.load(std::memory_order_acquire);
    if (job(gate) != last) return gate;
    relax();
  }
  std::unique_lock<std::mutex> lock(sleep_);
  ++sleepers_;
  wake_.wait(lock, [this, last] { return job(gate_.load()) != last; });
  --sleepers_;
  return gate_.load();
}

void Pool::work(int index) {
  inside_job = true;
  uint64_t last = 0;
  for (;;) {
    uint64_t gate = wait_for_job_after(last);
    last = job(gate);
    while (job(gate) == last && wanted(gate) > index) {
      if (!gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) continue;
      take_tasks(index + 1);
      gate_.fetch_sub(1, std::memory_order_release);
      break;
    }
  }
}

void Pool::take_tasks(int slot) {
  for (;;) {
    const int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
    if (index >= count_) return;
    task_(context_, index, slot);
  }
}

void Pool::run(int threads, int64_t count, detail::Task task, const void* context) {
  std::unique_lock<std::mutex> caller(caller_, std::defer_lock);
  if (threads <= 1 || inside_job || !caller.try_lock()) {
    for (int64_t index = 0; index < count; ++index) task(context, index, 0);
    return;
  }
  grow(threads - 1);
  task_ = task;
  context_ = context;
  count_ = count;
  next_.store(0, std::memory_order_relaxed);
  const uint64_t number = job(gate_.load()) + 1;
  gate_.store(number * job_unit + static_cast<uint64_t>(threads - 1) * wanted_unit);
  if (sleepers_.load() > 0) {
    { const std::lock_guard<std::mutex> lock(sleep_); }  // none is between its check and its sleep
    wake_.notify_all();
  }
  inside_job = true;
  take_tasks(0);
  inside_job = false;
  gate_.fetch_sub(static_cast<uint64_t>(threads - 1) * wanted_unit);
  for (int i = 0; inside(gate_.load(std::memory_order_acquire)) != 0; ++i) {
    if (i < spins) relax();
    else std::this_thread::yield();
  }
}

// Never destroyed: workers may still look at it while the process ends.
std::atomic<Pool*> the_pool{nullptr};

#if RESPIKE_POSIX
// A forked child has the memory of the pool but none of its threads: it starts a new one, and
// leaves the old one, whose locks may be held, alone.
void forget_pool() {
  the_pool.store(nullptr);
  inside_job = false;
}
#endif

Pool& pool() {
#if RESPIKE_POSIX
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  (void)registered;
#endif
  Pool* found = the_pool.load(std::memory_order_acquire);
  if (found != nullptr) return *found;
  Pool* made = new Pool;
  if (the_pool.compare_exchange_strong(found, made)) return *made;
  delete made;
  return *found;
}

}  // namespace

void detail::run(int threads, int64_t count, Task task, const void* context) {
  const int64_t useful = std::min<int64_t>(count, max_threads);
  pool().run(static_cast<int>(std::min<int64_t>(threads, useful)), count, task, context);
}

int pool_workers() { return pool().workers(); }

}  // namespace respike
