// Tokens that stay exact behind a window: who, and attention to them, query by query.
#include "keep.hpp"

#include <cmath>
#include <numeric>
#include <vector>

#include "pool.hpp"
#include "scratch.hpp"
#include "vec.hpp"

namespace respike {
using std::int64_t;

namespace {

// The place that a newcomer of worth `mine` takes at position `now`; -1: none. Of empty places,
// which come behind the taken ones, the first.
int64_t place_for(const KeepRule& rule, float mine, int64_t now, const float* worth,
                  const int64_t* position, int64_t places) {
  if (rule.window >= rule.reach) return -1;
  int64_t least = 0;
  for (int64_t m = 0; m < places; ++m) {
    if (position[m] < 0 || position[m] <= now - rule.reach) return m;
    if (worth[m] < worth[least]) least = m;
  }
  return mine > worth[least] ? least : -1;
}

constexpr float log2_of_e = 1.44269504f;
constexpr int64_t serial_work = 1 << 16;  // products; fewer are not worth waking a thread

int64_t padded_dim(int64_t dim) { return (dim + 63) / 64 * 64; }
int64_t padded_places(int64_t places) { return (places + 15) / 16 * 16; }

template <class T>
int64_t floats_of(const KeptJob<T>& job) {
  return job.heads * (padded_dim(job.dim) + padded_places(job.places)) + 64;
}

}  // namespace

void keep(const KeepRule& rule, const KeepJob& job, int64_t every) {
  std::vector<float> worth(job.held_worth, job.held_worth + job.places);
  std::vector<int64_t> position(job.held_position, job.held_position + job.places);
  std::vector<int64_t> who(static_cast<std::size_t>(job.places));
  std::iota(who.begin(), who.end(), int64_t{0});
  for (std::size_t m = 0; m < who.size(); ++m) {
    if (position[m] < 0) who[m] = -1;
  }
  std::fill_n(job.until, job.places + job.steps, int64_t{0});
  int64_t* held = job.held;
  for (int64_t t = 0; t < job.steps; ++t) {
    if (t % every == 0) held = std::copy(who.begin(), who.end(), held);
    int64_t& lost = job.lost[t * job.stride];
    lost = -1;
    const int64_t newcomer = job.start + t - rule.window;
    if (t >= job.valid || newcomer < rule.sinks) continue;
    const float mine = job.worth[t * job.stride];
    const int64_t place =
        place_for(rule, mine, job.start + t, worth.data(), position.data(), job.places);
    lost = job.places + t;
    if (place >= 0) {
      const auto m = static_cast<std::size_t>(place);
      std::swap(lost, who[m]);
      worth[m] = mine;
      position[m] = newcomer;
    }
    if (lost >= 0) job.until[lost] = t;
  }
  std::copy(who.begin(), who.end(), held);
  for (const int64_t m : who) {
    if (m >= 0) job.until[m] = job.steps;
  }
}

}  // namespace respike

#define RESPIKE_KERNELS "keep_kernels.inc"
#include "each_level.hpp"

namespace respike {

template <class T>
void attend_kept(Level level, int threads, const KeptJob<T>* jobs, int64_t count) {
  thread_local std::vector<float> desks;
  auto run = portable::run_kept<T>;
#if RESPIKE_X86
  if (level >= Level::avx512) {
    run = avx512::run_kept<T>;
  } else if (level >= Level::avx2) {
    run = avx2::run_kept<T>;
  }
#else
  (void)level;
#endif
  int64_t desk = 0, work = 0;
  for (int64_t j = 0; j < count; ++j) {
    desk = std::max(desk, (floats_of(jobs[j]) + 15) / 16 * 16);
    work += jobs[j].tokens * jobs[j].heads * jobs[j].places * jobs[j].dim;
  }
  threads = work < serial_work ? 1 : std::clamp(threads, 1, max_threads);
  float* memory = kept(desks, desk * threads);
  parallel_for(threads, count,
               [&](int64_t index, int slot) { run(jobs[index], memory + slot * desk); });
}

template void attend_kept(Level, int, const KeptJob<float>*, int64_t);
template void attend_kept(Level, int, const KeptJob<bf16>*, int64_t);

}  // namespace respike
