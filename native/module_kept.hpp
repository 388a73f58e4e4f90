// Batches of kept attention become jobs, for its op and for its gradients.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "kept_attention.hpp"

// Addresses of q (B, T, H, K), k and v (B, G, C, K), held (B, G, N + 1, M), until (B, G, C), mean
// (B, T, H, K) and log_mass (B, T, H), all contiguous. sizes: B, T, H, G, K, M.
template <class T>
std::vector<respike::KeptAttentionJob<T>> kept_jobs(const std::array<std::uintptr_t, 7>& buffers,
                                                    const std::array<std::int64_t, 6>& sizes,
                                                    std::int64_t every, float scale) {
  const auto [batch, tokens, heads, groups, K, places] = sizes;
  const std::int64_t each = heads / groups, candidates = places + tokens;
  const std::int64_t lists = (tokens + every - 1) / every + 1;
  const auto of = [&](int i, std::int64_t index) {
    return reinterpret_cast<const T*>(buffers[i]) + index;
  };
  const auto numbers = [&](int i, std::int64_t index) {
    return reinterpret_cast<const std::int64_t*>(buffers[i]) + index;
  };
  const auto found = [&](int i, std::int64_t index) {
    return reinterpret_cast<float*>(buffers[i]) + index;
  };
  std::vector<respike::KeptAttentionJob<T>> jobs;
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int64_t group = b * groups + g, head = b * tokens * heads + g * each;
      respike::KeptAttentionJob<T> job{};
      job.q = of(0, head * K);
      job.k = of(1, group * candidates * K);
      job.v = of(2, group * candidates * K);
      job.held = numbers(3, group * lists * places);
      job.until = numbers(4, group * candidates);
      job.q_stride = heads * K;
      job.every = every;
      job.places = places;
      job.tokens = tokens;
      job.heads = each;
      job.dim = K;
      job.scale = scale;
      job.mean = found(5, head * K);
      job.log_mass = found(6, head);
      job.mass_stride = heads;
      jobs.push_back(job);
    }
  }
  return jobs;
}
