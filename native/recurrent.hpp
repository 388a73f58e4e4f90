#pragma once
#include <cstdint>
#include "bf16.hpp"
#include "cpu.hpp"
namespace respike {
template <class T> struct FarJob {
  const T* q; std::int64_t q_stride; const T *k, *v; std::int64_t k_stride, v_stride, first_real, real;
  const float *key_weight, *key_bias, *query_weight, *beta; float log_decay; float* memory;
  const float* near_log_mass; std::int64_t mass_stride; T* near; std::int64_t near_stride;
  std::int64_t tokens, heads, features, key_dim, value_dim;
};
template <class T> void far(Level, int threads, const FarJob<T>* jobs, std::int64_t count);
}
