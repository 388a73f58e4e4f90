// Tokens that stay exact after they have left the window. The definition is respike.ops.keep.
#pragma once

#include <algorithm>
#include <cstdint>

#include "bf16.hpp"

namespace respike {

struct KeepRule {
  std::int64_t window, sinks, reach;

  // Position of the first query at which a token is let go; one is at each that follows.
  std::int64_t first_lost(std::int64_t places) const {
    return sinks + window + std::max<std::int64_t>(0, std::min(places, reach - window));
  }
};

// Who is kept when, for one KV group of one sequence; all contiguous but for worth and lost.
struct KeepJob {
  const float* worth;  // of the token that leaves at each step
  std::int64_t* lost;  // whom each step lets go; -1: nobody
  std::int64_t stride;  // of both, from one step to the next
  std::int64_t start, valid, steps;
  const float* held_worth;  // (places)
  const std::int64_t* held_position;
  std::int64_t places;
  std::int64_t* held;   // before steps 0, every, 2 * every, .. and behind the last, (.., places)
  std::int64_t* until;  // (places + steps)
};

void keep(const KeepRule& rule, const KeepJob& job, std::int64_t every);

// One KV group of one sequence: as keep, and what queries make of the kept tokens, joined to what
// they have made of the window under one denominator. Who is let go takes the newcomer's row.
template <class T>
struct KeptJob {
  KeepRule rule;
  std::int64_t start;          // position of the first query
  std::int64_t first_leaving;  // steps before this let nothing leave: no rows are read
  const T* q;                  // (tokens, heads, dim), rotated
  std::int64_t q_stride;
  const T* turned;             // (tokens, dim), keys of the tokens that leave, rotated
  T *plain, *values;           // likewise, not rotated; and values
  T *k, *plain_k, *v;          // (places, dim), of the kept
  float* worth;
  std::int64_t* position;
  std::int64_t places;
  const float* weight;  // (dim), for the logarithm of a key's worth
  float rate;           // what each position adds to it
  T* near;              // (tokens, heads, dim): the window's output; becomes the joint one
  std::int64_t near_stride;
  float* near_log_mass;  // (tokens, heads), likewise
  std::int64_t mass_stride;
  std::int64_t tokens, heads, dim;
  float scale;  // of scores
};

template <class T>
void attend_kept(Level level, int threads, const KeptJob<T>* jobs, std::int64_t count);

}  // namespace respike
