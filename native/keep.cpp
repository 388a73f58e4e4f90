// Tokens that stay exact behind a window: who, and attention to them.
#include "keep.hpp"

#include <cmath>
#include <numeric>
#include <vector>

#include "keep_columns.hpp"
#include "pool.hpp"

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

constexpr int64_t serial_work = 1 << 16;  // products; fewer are not worth waking a thread

// What one level does beside the parts of softmax.hpp; see keep_kernels.inc.
template <class T>
struct KeptParts {
  float (*worth)(const T* key, const float* weight, int64_t dim);
  void (*join)(const KeptJob<T>& job, int64_t first, int64_t last, const float* mean,
               const float* log_mass);
};

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
namespace {

template <class T>
KeptParts<T> kept_parts([[maybe_unused]] Level level) {
#if RESPIKE_X86
  if (level >= Level::avx512) return avx512::parts<T>();
  if (level >= Level::avx2) return avx2::parts<T>();
#endif
  return portable::parts<T>();
}

// The tiles of a job, one after the other. A tile first finds who is kept when, then shows its
// queries all who are kept at some time of it, and only then moves rows.
template <class T>
class KeptTiles {
 public:
  KeptTiles(Level level, const KeptJob<T>& job, float* memory)
      : own_(kept_parts<T>(level)), job_(job), most_(tile_tokens(job.heads, job.tokens)),
        desk_(memory),
        tile_(level, {job.q, job.q_stride, job.heads, job.dim, job.scale}, most_, desk_) {
    mean_ = desk_.template take<float>(most_ * job.heads * job.dim);
    log_mass_ = desk_.template take<float>(most_ * job.heads);
    columns_ = desk_.template take<Column<T>>(job.places + most_);
    column_of_ = desk_.template take<int64_t>(job.places);
    place_of_ = desk_.template take<int64_t>(most_);
  }

  int64_t floats() const { return desk_.used(); }

  void run() {
    while (taken_ < job_.places && job_.position[taken_] >= 0) ++taken_;
    for (int64_t first = 0; first < job_.tokens; first += most_) {
      const int64_t last = std::min(job_.tokens, first + most_);
      find(first, last);
      if (count_ > 0) attend(std::max(first, columns_[0].from), last);
      move(first, last);
    }
  }

 private:
  void find(int64_t first, int64_t last) {
    count_ = taken_;
    for (int64_t m = 0; m < taken_; ++m) {
      columns_[m] = {job_.k + m * job_.dim, job_.v + m * job_.dim, first, last};
      column_of_[m] = m;
    }
    for (int64_t t = first; t < last; ++t) {
      int64_t& place = place_of_[t - first] = -1;
      if (t < job_.first_leaving) continue;
      const int64_t now = job_.start + t, position = now - job_.rule.window, row = t * job_.dim;
      const float mine = own_.worth(job_.plain + row, job_.weight, job_.dim) +
                         static_cast<float>(position) * job_.rate;
      place = place_for(job_.rule, mine, now, job_.worth, job_.position, job_.places);
      if (place < 0) continue;
      const bool unseen = place < taken_ && columns_[column_of_[place]].from == t;
      if (place < taken_) columns_[column_of_[place]].until = t;
      if (!unseen) column_of_[place] = count_++;  // else nobody sees who stood here
      columns_[column_of_[place]] = {job_.turned + row, job_.values + row, t, last};
      taken_ = std::max(taken_, place + 1);
      job_.worth[place] = mine;
      job_.position[place] = position;
    }
  }

  // Every token in [first, last) sees somebody: places do not become empty.
  void attend(int64_t first, int64_t last) {
    whole_first(columns_, count_, first, last);
    tile_.attend(columns_, count_, first, last, mean_, job_.heads * job_.dim, log_mass_,
                 job_.heads);
    own_.join(job_, first, last, mean_, log_mass_);
  }

  void move(int64_t first, int64_t last) {
    const int64_t dim = job_.dim;
    for (int64_t t = first; t < last; ++t) {
      const int64_t place = place_of_[t - first];
      if (place < 0) continue;
      T *plain = job_.plain + t * dim, *value = job_.values + t * dim;
      std::copy_n(job_.turned + t * dim, dim, job_.k + place * dim);
      std::swap_ranges(plain, plain + dim, job_.plain_k + place * dim);
      std::swap_ranges(value, value + dim, job_.v + place * dim);
    }
  }

  const KeptParts<T> own_;
  const KeptJob<T>& job_;
  const int64_t most_;  // tokens of a tile
  Desk desk_;
  ColumnTile<T> tile_;
  float *mean_, *log_mass_;
  Column<T>* columns_;
  int64_t *column_of_, *place_of_;  // of a place, its last column; of a step, where who left went
  int64_t count_ = 0, taken_ = 0;   // columns; places, which fill from the first
};

}  // namespace

template <class T>
void attend_kept(Level level, int threads, const KeptJob<T>* jobs, int64_t count) {
  thread_local std::vector<float> desks;
  int64_t desk = 0, work = 0;
  for (int64_t j = 0; j < count; ++j) {
    desk = std::max(desk, KeptTiles<T>(level, jobs[j], nullptr).floats());
    work += jobs[j].tokens * jobs[j].heads * jobs[j].places * jobs[j].dim;
  }
  threads = work < serial_work ? 1 : std::clamp(threads, 1, max_threads);
  float* memory = kept(desks, desk * threads);
  parallel_for(threads, count, [&](int64_t index, int slot) {
    KeptTiles<T>(level, jobs[index], memory + slot * desk).run();
  });
}

template void attend_kept(Level, int, const KeptJob<float>*, int64_t);
template void attend_kept(Level, int, const KeptJob<bf16>*, int64_t);

}  // namespace respike
