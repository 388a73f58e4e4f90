// Block-sparse softmax. The definition is respike.ops.blocks.blocks_definition.
//
// The tokens of a job are cut into tiles, as in softmax.cpp, whose parts attend to the keys. Before,
// each token chooses its blocks, see block_choice.hpp. A chosen block is packed once a tile, and
// shown to the rows that chose it.
//
// Two blocks at different distances ask for the same query at different angles. The queries of a
// tile are therefore rotated once, from the tile's base, and the keys of a block, once packed, to
// their place relative to that base; at the reach, all queries are rotated alike and keys are taken
// as they are.
#include "blocks.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "block_choice.hpp"
#include "pool.hpp"
#include "scratch.hpp"
#include "vec.hpp"

namespace respike {
using std::int64_t;

namespace {

constexpr int64_t most_tile_tokens = tile_rows;
constexpr int64_t piece_blocks = 2048;      // candidates of a job of one tile are scored in pieces
constexpr int64_t near_turns = 256;         // a number of blocks is this times one index, plus one
constexpr int64_t far_turns = 1024;
constexpr int64_t few_rows = 12;            // of a tile are not worth packing a block for

// What one level does; see blocks_kernels.inc.
template <class T, class E>
struct BlockParts {
  void (*turn_query)(const T*, float, BlockTurns::Row, int64_t, float*);
  void (*turn_again)(const float*, float, BlockTurns::Row, int64_t, float*);
  void (*turn_cells)(const T*, float, BlockTurns::Row, int64_t, T*);
  void (*turn_key)(const E*, float, BlockTurns::Row, int64_t, T*);
  void (*attend_rows)(const SoftmaxTile&, Keys<E>, const float* q, int64_t q_stride,
                      const int64_t* at, int64_t* seen, int64_t rows);
  int64_t step;  // of which a row of queries for attend_rows has a multiple
};

}  // namespace
}  // namespace respike

#define RESPIKE_KERNELS "blocks_kernels.inc"
#include "each_level.hpp"

namespace respike {

// ---- angles

BlockTurns::BlockTurns(const BlockRule& rule, const double* frequencies, int64_t half)
    : half_(half),
      tokens_(rule.block + most_tile_tokens),
      block_(static_cast<double>(rule.block)),
      frequencies_(frequencies, frequencies + half) {
  for (int64_t i = 0; i < tokens_; ++i) add(static_cast<double>(i));
  for (const int64_t reach : {rule.reach, rule.sink_reach}) {
    add(reach == BlockRule::everywhere ? 0.0 : static_cast<double>(reach - 1));
  }
  for (int64_t i = 0; i < near_turns; ++i) add(block_ * static_cast<double>(i));
  for (int64_t i = 0; i < far_turns; ++i) add(block_ * static_cast<double>(i * near_turns));
}

void BlockTurns::add(double tokens) {
  for (const double f : frequencies_) table_.push_back(static_cast<float>(std::cos(tokens * f)));
  for (const double f : frequencies_) table_.push_back(static_cast<float>(std::sin(tokens * f)));
}

BlockTurns::Row BlockTurns::blocks(int64_t count, float* scratch) const {
  const int64_t size = std::abs(count);
  const float sign = count < 0 ? -1.0f : 1.0f;
  float *cos = scratch, *sin = scratch + half_;
  if (size >= near_turns * far_turns) {
    for (int64_t i = 0; i < half_; ++i) {
      const double angle = static_cast<double>(count) * block_ * frequencies_[i];
      cos[i] = static_cast<float>(std::cos(angle));
      sin[i] = static_cast<float>(std::sin(angle));
    }
    return {cos, sin};
  }
  const Row a = row(tokens_ + 2, size % near_turns);
  const Row b = row(tokens_ + 2 + near_turns, size / near_turns);
  for (int64_t i = 0; i < half_; ++i) {
    cos[i] = a.cos[i] * b.cos[i] - a.sin[i] * b.sin[i];
    sin[i] = sign * (a.sin[i] * b.cos[i] + a.cos[i] * b.sin[i]);
  }
  return {cos, sin};
}

namespace {

template <class T, class E>
BlockParts<T, E> block_parts([[maybe_unused]] Level level) {
#if RESPIKE_X86
  if (level >= Level::avx512) return avx512::parts<T, E>();
  if (level >= Level::avx2) return avx2::parts<T, E>();
#endif
  return portable::parts<T, E>();
}

// What is seen in one way: queries and what is done to keys.
enum class Way { placed, still, sink };

// One tile of a job, and what works on it.
template <class T, class E>
class BlockTile {
 public:
  BlockTile(Level level, const BlockParts<T, E>& own, const BlockRule& rule,
            const BlockTurns& turns, const BlocksJob<T, E>& job, int64_t first, int64_t last,
            float* memory)
      : own_(own), parts_(softmax_parts<T, T>(level)), parts_of_choice_(choice_parts<T>(level)),
        rule_(rule), turns_(turns), job_(job), first_(first), tokens_(last - first),
        position_(job.start + first),
        base_(position_ / rule.block * rule.block), rows_(tokens_ * job.heads),
        far_(rule.first_near(position_ + tokens_ - 1)), sinks_(rule.sink_blocks()), desk_(memory) {
    const int64_t K = job.head_dim;
    candidates_.rule = rule;
    candidates_.turns = &turns;
    candidates_.summaries = job.summaries;
    candidates_.deep = rule.block / rule.summary;
    candidates_.tokens = tokens_;
    candidates_.heads = job.heads;
    candidates_.head_dim = K;
    candidates_.base = base_;
    candidates_.position = position_;
    candidates_.factor = job.scale * log2_e;
    candidates_.q_stride = row_ = (K + own.step - 1) / own.step * own.step;
    for (auto& cells : cells_) cells = desk_.template take<float>(rows_ * query_row(K));
    candidates_.q = q_ = desk_.template take<float>(rows_ * row_);
    q_still_ = desk_.template take<float>(rows_ * row_);
    candidates_.still = cells_[static_cast<std::size_t>(Way::still)];
    if (tokens_ == 1) candidates_.still = q_still_;
    if (chooses()) {
      if (tokens_ == 1) scores_ = desk_.template take<float>(job.heads * stride());
      if (tokens_ > 1) candidates_.products = desk_.template take<float>(rows_ * tile_width);
      lists_ = desk_.template take<float>(list_floats(rows_, rule.top));
    }
    q_few_ = desk_.template take<float>(std::max(few_rows, job.heads) * row_);
    few_at_ = desk_.template take<int64_t>(std::max(few_rows, job.heads));
    few_seen_ = desk_.template take<int64_t>(std::max(few_rows, job.heads));
    turned_ = desk_.template take<T>(rows_ * K);
    state_ = desk_.template take<float>(state_floats(rows_, job.value_dim));
    packed_keys_ = desk_.template take<float>(key_panel(K));
    packed_values_ = desk_.template take<float>(value_panel(job.value_dim));
    keys_ = desk_.template take<T>(block_keys * K);
    values_ = desk_.template take<T>(block_keys * job.value_dim);
    candidates_.panel = desk_.template take<float>(key_panel(K));
    candidates_.panel_rows = desk_.template take<T>(tile_width * K);
    candidates_.turned_rows = desk_.template take<float>(tile_width * K);
    candidates_.q_turned = desk_.template take<float>(job.heads * row_);
    candidates_.angles = desk_.template take<float>(K);
  }

  int64_t floats() const { return desk_.used(); }
  // Some token has more candidates than it may choose.
  bool chooses() const { return far_ - sinks_ > rule_.top; }
  int64_t candidates() const { return far_; }

  // Queries as choice and few rows need them. First of all.
  void prepare() {
    std::fill(candidates_.q_turned, candidates_.q_turned + job_.heads * row_, 0.0f);
    std::fill(q_, q_ + rows_ * row_, 0.0f);
    each_query([&](int64_t token, int64_t row, const T* q) {
      own_.turn_query(q, 1.0f, turns_.tokens(position_ + token - base_), turns_.half(),
                      q_ + row * row_);
    });
    if (!few() || rule_.held(last()) == 0) return;
    std::fill(q_still_, q_still_ + rows_ * row_, 0.0f);
    each_query([&](int64_t, int64_t row, const T* q) {
      float* to = q_still_ + row * row_;
      own_.turn_query(q, 1.0f, turns_.reach(), turns_.half(), to);
      for (int64_t i = 0; i < job_.head_dim; ++i) to[i] = round_as<T>(to[i]);  // as cells are
    });
  }

  // Of a tile of one token: scores of candidates [from, to).
  void score(int64_t from, int64_t to) {
    parts_of_choice_.score_token(candidates_, std::max(from, std::min(sinks_, far_)), to, scores_,
                                 stride());
  }
  // From now on with scratch of another tile of this job.
  void borrow(const BlockTile& lender) {
    candidates_.angles = lender.candidates_.angles;
    candidates_.q_turned = lender.candidates_.q_turned;
    std::fill(candidates_.q_turned, candidates_.q_turned + job_.heads * row_, 0.0f);
  }

  // The outputs; of one token once all its candidates are scored.
  void attend() {
    tile_ = {};
    tile_.rows = rows_;
    tile_.heads = job_.heads;
    tile_.head_dim = job_.head_dim;
    tile_.value_dim = job_.value_dim;
    tile_.position = position_;
    tile_.factor = candidates_.factor;
    clear(tile_, state_);
    block_ = {};
    block_.keys = packed_keys_;
    block_.values = packed_values_;
    block_.window = without_window;
    std::fill(q_few_, q_few_ + std::max(few_rows, job_.heads) * row_, 0.0f);
    show_sinks();
    show_chosen();
    show_near();
    float* log_mass = job_.log_mass;
    if (log_mass != nullptr) log_mass += first_ * job_.mass_stride;
    parts_.finish(tile_, job_.out + first_ * job_.out_stride, job_.out_stride, log_mass,
                  job_.mass_stride);
  }

 private:
  int64_t last() const { return position_ + tokens_ - 1; }
  int64_t stride() const { return far_ + tile_width; }  // of scores: they are read 64 at a time

  template <class F>
  void each_query(const F& use) const {
    for (int64_t t = 0; t < tokens_; ++t) {
      const T* q = job_.q + (first_ + t) * job_.q_stride;
      for (int64_t h = 0; h < job_.heads; ++h) {
        use(t, t * job_.heads + h, q + h * job_.head_dim);
      }
    }
  }

  // Queries as cells, made when they are first asked for.
  void take_queries(Way way) {
    const auto index = static_cast<std::size_t>(way);
    tile_.q = cells_[index];
    if (loaded_[index]) return;
    loaded_[index] = true;
    each_query([&](int64_t token, int64_t row, const T* q) {
      const BlockTurns::Row angle = way == Way::placed  ? turns_.tokens(position_ + token - base_)
                                    : way == Way::still ? turns_.reach()
                                                        : turns_.sink_reach();
      own_.turn_cells(q, 1.0f, angle, turns_.half(), turned_ + row * job_.head_dim);
    });
    parts_.load_queries(turned_, job_.heads * job_.head_dim, tokens_, tile_, cells_[index]);
  }

  // Packs positions [from, from + count), at most 64.
  void take_keys(int64_t from, int64_t count, Way way) {
    Keys<T> rows;
    rows.count = count;
    rows.stride = job_.head_dim;
    rows.v_stride = job_.value_dim;
    rows.k = keys_;
    rows.v = values_;
    constexpr bool same_type = std::is_same_v<T, E>;
    const auto scale = [](const float* scales, int64_t at) {
      return scales == nullptr ? 1.0f : scales[at];
    };
    if (!same_type || way == Way::placed) {
      BlockTurns::Row angle{nullptr, nullptr};
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = from + i;
        if (way == Way::placed && (i == 0 || at % rule_.block == 0)) {
          angle = turns_.blocks(at / rule_.block - base_ / rule_.block, candidates_.angles);
        }
        own_.turn_key(job_.keys.k + at * job_.keys.stride, scale(job_.keys.k_scale, at), angle,
                      turns_.half(), keys_ + i * job_.head_dim);
      }
    }
    if constexpr (same_type) {
      if (way != Way::placed) {
        rows.k = job_.keys.k + from * job_.keys.stride;
        rows.stride = job_.keys.stride;
      }
      rows.v = job_.keys.v + from * job_.keys.value_stride();
      rows.v_stride = job_.keys.value_stride();
    } else {
      for (int64_t i = 0; i < count; ++i) {
        const E* v = job_.keys.v + (from + i) * job_.keys.value_stride();
        T* to = values_ + i * job_.value_dim;
        own_.turn_key(v, scale(job_.keys.v_scale, from + i), {nullptr, nullptr},
                      job_.value_dim / 2, to);
        if (job_.value_dim % 2 != 0) {
          store(to + job_.value_dim - 1,
                load(v + job_.value_dim - 1) * scale(job_.keys.v_scale, from + i));
        }
      }
    }
    block_.count = count;
    block_.first = from;
    parts_.pack(rows, tile_, block_);
  }

  // Shows positions [from, to), which begin a block, to tokens [first, end) of the tile.
  void show(int64_t from, int64_t to, Way way, int64_t first, int64_t end) {
    if (first >= end) return;
    if (few()) {
      for (; from < to; from += rule_.block) {
        begin_few(from, std::min(to, from + rule_.block), way);
        for (int64_t t = first; t < end; ++t) add_few(t);
        show_few();
      }
      return;
    }
    take_queries(way);
    for (; from < to; from += block_keys) {
      take_keys(from, std::min(block_keys, to - from), way);
      parts_.attend(tile_, block_, first * job_.heads, end * job_.heads);
    }
  }

  // Few rows see keys without packing them: queries are rotated instead. Of the tile, not of those
  // that chose a block: bits must not depend on what later tokens choose.
  bool few() const { return tokens_ == 1 || rows_ <= few_rows; }
  void begin_few(int64_t from, int64_t to, Way way) {
    few_count_ = 0;
    few_from_ = from;
    few_to_ = to;
    few_way_ = way;
    if (way == Way::placed) {
      few_angle_ = turns_.blocks((base_ - from) / rule_.block, candidates_.angles);
    }
  }
  void add_few(int64_t token) {
    for (int64_t h = 0; h < job_.heads; ++h, ++few_count_) {
      const int64_t row = token * job_.heads + h, at = row * row_;
      float* to = q_few_ + few_count_ * row_;
      if (few_way_ == Way::placed) {
        own_.turn_again(q_ + at, 1.0f, few_angle_, turns_.half(), to);
      } else if (few_way_ == Way::still) {
        std::copy_n(q_still_ + at, job_.head_dim, to);
      } else {
        own_.turn_query(job_.q + (first_ + token) * job_.q_stride + h * job_.head_dim, 1.0f,
                        turns_.sink_reach(), turns_.half(), to);
      }
      few_at_[few_count_] = row;
      few_seen_[few_count_] = position_ + token + 1 - few_from_;
    }
  }
  void show_few() {
    Keys<E> keys = job_.keys;
    keys.v_stride = keys.value_stride();
    keys.k += few_from_ * keys.stride;
    keys.v += few_from_ * keys.v_stride;
    if (keys.k_scale != nullptr) {
      keys.k_scale += few_from_;
      keys.v_scale += few_from_;
    }
    keys.count = few_to_ - few_from_;
    own_.attend_rows(tile_, keys, q_few_, row_, few_at_, few_seen_, few_count_);
  }

  // The first token of the tile whose window does not reach into a block; all do after it.
  int64_t leaves(int64_t block) const {
    return std::clamp((block + 1) * rule_.block + rule_.window - 1 - position_, int64_t{0},
                      tokens_);
  }
  // The first token of the tile that sees a block at the reach.
  int64_t stands(int64_t block, int64_t reach) const {
    if (reach == BlockRule::everywhere) return tokens_;
    return std::clamp(block * rule_.block + reach - position_, int64_t{0}, tokens_);
  }
  // The same of a block that is chosen.
  int64_t holds(int64_t block) const {
    return std::max(stands(block, rule_.reach),
                    std::clamp(rule_.true_tokens - position_, int64_t{0}, tokens_));
  }

  void show_sinks() {
    for (int64_t b = 0; b < std::min(sinks_, far_); ++b) {
      const int64_t from = b * rule_.block, to = from + rule_.block;
      const int64_t left = leaves(b), still = std::max(left, stands(b, rule_.sink_reach));
      show(from, to, Way::placed, left, still);
      show(from, to, Way::sink, still, tokens_);
    }
  }

  void show_near() {
    const int64_t end = last() + 1;
    int64_t b = rule_.first_near(position_);
    for (; b < far_; ++b) show(b * rule_.block, (b + 1) * rule_.block, Way::placed, 0, leaves(b));
    show(b * rule_.block, end, Way::placed, 0, tokens_);
  }

  // Each token chooses; blocks are then shown in the order of their places.
  void show_chosen() {
    if (far_ <= sinks_) return;
    if (!chooses()) {
      for (int64_t b = sinks_; b < far_; ++b) show_to(b, leaves(b), tokens_);
      return;
    }
    thread_local std::vector<std::int32_t> found;
    thread_local std::vector<std::uint64_t> chosen;  // bit t of row b: token t chose block b
    const int64_t words = (tokens_ + 63) / 64;
    chosen.assign(static_cast<std::size_t>(far_ * words), 0);
    const Lists lists = fill_lists();
    for (int64_t t = 0; t < tokens_; ++t) {
      if (rule_.first_near(position_ + t) <= sinks_) continue;
      parts_of_choice_.choose(lists, t * job_.heads, job_.heads, found);
      for (const int64_t b : found) {
        chosen[b * words + t / 64] |= std::uint64_t{1} << (t % 64);
        if (job_.chosen == nullptr) continue;
        job_.chosen[(first_ + t) * job_.chosen_stride + b / 64] |= std::uint64_t{1} << (b % 64);
      }
    }
    const auto next = [&](int64_t b) {
      const auto row = chosen.begin() + b * words;
      const auto bit = std::find_if(row, chosen.end(), [](std::uint64_t word) { return word != 0; });
      return (bit - chosen.begin()) / words;
    };
    for (int64_t b = next(sinks_), then; b < far_; b = then) {
      then = next(b + 1);
      if (then < far_) fetch(then);
      const std::uint64_t* row = chosen.data() + b * words;
      show_some(b, [row](int64_t t) { return (row[t / 64] >> (t % 64) & 1) != 0; });
    }
  }

  // Asks for the keys and values of a block: chosen ones lie far apart. Inline, all of it: GCC drops
  // calls of what does nothing but prefetch.
  RESPIKE_INLINE void fetch([[maybe_unused]] int64_t b) const {
#if defined(__GNUC__)
    const int64_t first = b * rule_.block;
    const int64_t numbers = static_cast<int64_t>(64 / sizeof(E));  // of a cache line
    for (int64_t i = first; i < first + rule_.block; ++i) {
      const E* k = job_.keys.k + i * job_.keys.stride;
      const E* v = job_.keys.v + i * job_.keys.value_stride();
      for (int64_t c = 0; c < job_.head_dim; c += numbers) __builtin_prefetch(k + c);
      for (int64_t c = 0; c < job_.value_dim; c += numbers) __builtin_prefetch(v + c);
    }
#endif
  }

  Lists fill_lists() {
    const Lists lists = clear_lists(rows_, rule_.top, lists_);
    if (tokens_ == 1) {
      parts_of_choice_.see_token(candidates_, lists, sinks_, far_, scores_, stride());
      return lists;
    }
    if (rule_.held(last()) > 0) take_queries(Way::still);
    parts_of_choice_.see_tile(candidates_, lists, sinks_, far_);
    return lists;
  }

  // Shows a block to tokens [first, end).
  void show_to(int64_t b, int64_t first, int64_t end) {
    const int64_t still = std::clamp(holds(b), first, std::max(first, end));
    show(b * rule_.block, (b + 1) * rule_.block, Way::placed, first, still);
    show(b * rule_.block, (b + 1) * rule_.block, Way::still, still, end);
  }

  // Shows a block to the tokens that chose it, packed once for each way.
  template <class F>
  void show_some(int64_t b, const F& chose) {
    const int64_t still = holds(b), from = b * rule_.block;
    thread_local std::vector<std::int32_t> rows;
    for (const Way way : {Way::placed, Way::still}) {
      const int64_t begin = way == Way::placed ? 0 : still;
      const int64_t end = way == Way::placed ? still : tokens_;
      rows.clear();
      if (few()) begin_few(from, from + rule_.block, way);
      for (int64_t t = begin; t < end; ++t) {
        if (!chose(t)) continue;
        if (few()) add_few(t);
        for (int64_t h = 0; h < job_.heads; ++h) {
          rows.push_back(static_cast<std::int32_t>(t * job_.heads + h));
        }
      }
      if (rows.empty()) continue;
      if (few()) {
        show_few();
        continue;
      }
      take_queries(way);
      for (int64_t at = from; at < from + rule_.block; at += block_keys) {
        take_keys(at, std::min(block_keys, from + rule_.block - at), way);
        parts_.attend_some(tile_, block_, rows.data(), static_cast<int64_t>(rows.size()));
      }
    }
  }

  const BlockParts<T, E>& own_;
  const SoftmaxParts<T, T> parts_;
  const ChoiceParts<T> parts_of_choice_;
  const BlockRule& rule_;
  const BlockTurns& turns_;
  const BlocksJob<T, E>& job_;
  const int64_t first_, tokens_, position_, base_, rows_, far_, sinks_;
  int64_t row_ = 0;  // numbers of a query's row, of those that few rows are
  Desk desk_;
  Candidates<T> candidates_{};
  SoftmaxTile tile_{};
  KeyBlock block_{};
  bool loaded_[3] = {};
  int64_t few_count_ = 0, few_from_ = 0, few_to_ = 0;
  Way few_way_ = Way::placed;
  BlockTurns::Row few_angle_{};
  int64_t *few_at_ = nullptr, *few_seen_ = nullptr;
  float *q_ = nullptr, *q_still_ = nullptr, *q_few_ = nullptr, *state_ = nullptr;
  float *scores_ = nullptr, *lists_ = nullptr;
  float *cells_[3] = {}, *packed_keys_ = nullptr, *packed_values_ = nullptr;
  T *turned_ = nullptr, *keys_ = nullptr, *values_ = nullptr;
};

struct Unit {
  int64_t job, first, last;
};

}  // namespace

template <class T, class E>
void blocks(Level level, int threads, const BlockRule& rule, const BlockTurns& turns,
            const BlocksJob<T, E>* jobs, int64_t count) {
  thread_local std::vector<float> desks, own_tables;
  thread_local std::vector<Unit> units;
  const BlockParts<T, E> own = block_parts<T, E>(level);
  threads = std::clamp(threads, 1, max_threads);
  const auto tile = [&](const Unit& u, float* memory) {
    return BlockTile<T, E>(level, own, rule, turns, jobs[u.job], u.first, u.last, memory);
  };
  int64_t desk = 0;
  units.clear();
  for (int64_t j = 0; j < count; ++j) {
    const int64_t step = std::max<int64_t>(tile_rows / jobs[j].heads, 1);
    for (int64_t first = 0; first < jobs[j].tokens; first += step) {
      const Unit unit{j, first, std::min(jobs[j].tokens, first + step)};
      desk = std::max(desk, tile(unit, nullptr).floats());
      units.push_back(unit);
    }
  }
  const std::vector<Unit>& all = units;  // what tasks name is the caller's, not their own thread's
  const auto tiles = static_cast<int64_t>(all.size());
  float* memory = kept(desks, desk * threads);
  const auto alone = [&](int64_t index) { return all[index].last - all[index].first == 1; };
  bool decoding = true;
  for (int64_t i = 0; i < tiles; ++i) decoding = decoding && alone(i);
  if (!decoding || tiles >= 2 * threads) {
    parallel_for(threads, tiles, [&](int64_t index, int slot) {
      // The last tiles of a long job take longest: they go first.
      BlockTile<T, E> one = tile(all[tiles - 1 - index], memory + slot * desk);
      one.prepare();
      if (one.chooses() && alone(tiles - 1 - index)) one.score(0, one.candidates());
      one.attend();
    });
    return;
  }
  // Few tiles of a token each, as in decoding: candidates are scored in pieces by all threads.
  float* tables = kept(own_tables, desk * tiles);
  const auto own_tile = [&](int64_t index) { return tile(all[index], tables + index * desk); };
  int64_t most = 0;
  for (int64_t i = 0; i < tiles; ++i) {
    BlockTile<T, E> one = own_tile(i);
    one.prepare();
    if (!one.chooses()) continue;
    most = std::max(most, (one.candidates() + piece_blocks - 1) / piece_blocks);
  }
  parallel_for(threads, tiles * most, [&](int64_t index, int slot) {
    BlockTile<T, E> one = own_tile(index / most);
    const int64_t from = index % most * piece_blocks;
    if (!one.chooses() || from >= one.candidates()) return;
    one.borrow(tile(all[index / most], memory + slot * desk));
    one.score(from, std::min(one.candidates(), from + piece_blocks));
  });
  parallel_for(threads, tiles, [&](int64_t index, int) { own_tile(index).attend(); });
}

#define RESPIKE_FOR(T, E)                                                                 \
  template void blocks(Level, int, const BlockRule&, const BlockTurns&,                   \
                       const BlocksJob<T, E>*, int64_t);
RESPIKE_FOR(float, float)
RESPIKE_FOR(bf16, bf16)
RESPIKE_FOR(float, std::int8_t)
RESPIKE_FOR(bf16, std::int8_t)
#undef RESPIKE_FOR

}  // namespace respike
