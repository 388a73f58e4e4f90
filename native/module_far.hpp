// How the Python module is told of far memories.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "recurrent.hpp"

using FarStrides = std::array<std::int64_t, 3>;  // elements: from row to row, token, group
using FarSizes = std::array<std::int64_t, 6>;    // B, T, H, G, K, V

namespace detail {
template <class T>
T* far_at(std::uintptr_t start, std::int64_t index) {
  return reinterpret_cast<T*>(start) + index;
}
template <class T>
T* far_at(std::uintptr_t start, const FarStrides& strides, std::int64_t b, std::int64_t g) {
  return far_at<T>(start, b * strides[0] + g * strides[2]);
}
}  // namespace detail

// One job for each KV group of each sequence, in order. weights: key_weight, key_bias, query_weight, beta, log_decay; first_real and real: one a row.
template <class T>
std::vector<respike::FarJob<T>> far_jobs(
    std::uintptr_t q, std::uintptr_t k, std::uintptr_t v, std::uintptr_t first_real, std::uintptr_t real,
    const std::array<std::uintptr_t, 5>& weights, std::uintptr_t memory, std::uintptr_t near_log_mass,
    std::uintptr_t near, const std::array<FarStrides, 3>& strides, const FarSizes& sizes,
    std::int64_t features) {
  const auto& [batch, tokens, heads, groups, key_dim, value_dim] = sizes;
  std::vector<respike::FarJob<T>> jobs;
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int64_t each = heads / groups, head = b * tokens * heads + g * each;
      respike::FarJob<T> job{};
      job.q = detail::far_at<const T>(q, strides[0], b, g);
      job.q_stride = strides[0][1];
      job.k = detail::far_at<const T>(k, strides[1], b, g);
      job.v = detail::far_at<const T>(v, strides[2], b, g);
      job.k_stride = strides[1][1];
      job.v_stride = strides[2][1];
      job.first_real = *detail::far_at<const std::int64_t>(first_real, b);
      job.real = *detail::far_at<const std::int64_t>(real, b);
      job.key_weight = detail::far_at<const float>(weights[0], g * features * key_dim);
      job.key_bias = detail::far_at<const float>(weights[1], g * features);
      job.query_weight = detail::far_at<const float>(weights[2], g * each * features * key_dim);
      job.beta = detail::far_at<const float>(weights[3], g * each);
      job.log_decay = *detail::far_at<const float>(weights[4], g);
      job.memory = detail::far_at<float>(memory, (b * groups + g) * features * (value_dim + 1));
      job.near_log_mass = detail::far_at<const float>(near_log_mass, head);
      job.mass_stride = heads;
      job.near = detail::far_at<T>(near, head * value_dim);
      job.near_stride = heads * value_dim;
      job.tokens = tokens;
      job.heads = each;
      job.features = features;
      job.key_dim = key_dim;
      job.value_dim = value_dim;
      jobs.push_back(job);
    }
  }
  return jobs;
}
