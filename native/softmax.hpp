#pragma once
#include <cstdint>
#include "bf16.hpp"
#include "cpu.hpp"
namespace respike {
template <class T> struct Keys { const T* k; const T* v; std::int64_t stride; std::int64_t count; };
template <class T> struct SoftmaxJob {
  const T* q; const T* q_sink; std::int64_t q_stride;
  Keys<T> sinks; Keys<T> keys;
  std::int64_t first, start, tokens, heads, head_dim, value_dim, window;
  float scale; T* out; std::int64_t out_stride; float* log_mass; std::int64_t mass_stride;
};
template <class T> void softmax(Level, int threads, const SoftmaxJob<T>* jobs, std::int64_t count);
}
