// How the Python module is told of keys and values in a cache.
#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "softmax.hpp"

// Addresses of k, v and their scales, steps from one sequence and from one group to the next: of k,
// of v, of scales; the steps from row to row of k and v; rows.
using Cache = std::array<std::int64_t, 13>;

template <class E>
respike::Keys<E> keys_of(const Cache& c, std::int64_t b, std::int64_t g) {
  const auto at = [&](int address, int steps) {
    return std::pair{static_cast<std::uintptr_t>(c[address]), b * c[steps] + g * c[steps + 1]};
  };
  const auto scales = [&](int address) -> const float* {
    if (c[address] == 0) return nullptr;
    return reinterpret_cast<const float*>(at(address, 8).first) + at(address, 8).second;
  };
  const auto [k, k_at] = at(0, 4);
  const auto [v, v_at] = at(1, 6);
  return {reinterpret_cast<const E*>(k) + k_at, reinterpret_cast<const E*>(v) + v_at, c[10], c[12],
          scales(2), scales(3), c[11]};
}
