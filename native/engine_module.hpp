// What the files of the Python module share.
#pragma once

#include <nanobind/nanobind.h>

#include <array>

#include "blocks.hpp"

// The fields of respike.ops.block_rule.BlockRule in order; -1 where a reach is None.
using BlockRuleNumbers = std::array<std::int64_t, 8>;

inline respike::BlockRule block_rule(const BlockRuleNumbers& r) {
  const auto reach = [](std::int64_t tokens) {
    return tokens < 0 ? respike::BlockRule::everywhere : tokens;
  };
  return {r[0], r[1], r[2], r[3], r[4], reach(r[5]), reach(r[6]), r[7]};
}

void bind_engine(nanobind::module_& m);
