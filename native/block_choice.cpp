// The choice among old blocks; see block_choice.hpp.
#include "block_choice.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "scratch.hpp"
#include "vec.hpp"

namespace respike {
using std::int64_t;

namespace {

constexpr int64_t rows_together = 24;  // whose products stay in the L1 cache
constexpr float slack = 8.0f;          // powers of two a score may exceed `most` before it is raised

// The best of a list: what is above a score, and of what equals it the first few.
struct Cut {
  float above;
  int64_t equal;
};

}  // namespace
}  // namespace respike

#define RESPIKE_PAIRS
#define RESPIKE_KERNELS "block_choice_kernels.inc"
#include "each_level.hpp"

namespace respike {

namespace {
#include "level_parts.inc"
}  // namespace

template <class T>
ChoiceParts<T> choice_parts(Level level) {
  return parts_for<T>(level);
}

namespace {

Lists lay_out(int64_t rows, int64_t top, Desk& desk) {
  Lists lists{};
  lists.rows = rows;
  lists.top = top;
  lists.most = desk.take<float>(rows);
  lists.mass = desk.take<float>(rows * lanes_of_mass);
  lists.least = desk.take<float>(rows);
  lists.count = desk.take<int64_t>(rows);
  lists.score = desk.take<float>(rows * lists.room());
  lists.block = desk.take<std::int32_t>(rows * lists.room());
  return lists;
}

}  // namespace

int64_t list_floats(int64_t rows, int64_t top) {
  Desk desk(nullptr);
  lay_out(rows, top, desk);
  return desk.used();
}

Lists clear_lists(int64_t rows, int64_t top, float* memory) {
  Desk desk(memory);
  const Lists lists = lay_out(rows, top, desk);
  std::fill_n(lists.most, rows, minus_infinity);
  std::fill_n(lists.mass, rows * lanes_of_mass, 0.0f);
  std::fill_n(lists.least, rows, minus_infinity);
  std::fill_n(lists.count, rows, 0);
  return lists;
}

template ChoiceParts<float> choice_parts(Level);
template ChoiceParts<bf16> choice_parts(Level);

}  // namespace respike
