// Working memory that the next call needs again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace respike {

// float32 memory from a cache line on; what was in it may be in it still.
inline float* kept(std::vector<float>& memory, std::int64_t floats) {
  const auto size = static_cast<std::size_t>(floats) + 16;
  if (memory.size() < size) memory.resize(size);
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

// Memory handed out from cache line to cache line; with no memory it only counts.
class Desk {
 public:
  explicit Desk(float* memory) : memory_(memory) {}
  template <class N>
  N* take(std::int64_t count) {
    float* start = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += ((count * static_cast<std::int64_t>(sizeof(N)) + 3) / 4 + 15) / 16 * 16;
    return reinterpret_cast<N*>(start);
  }
  std::int64_t used() const { return used_; }

 private:
  float* memory_;
  std::int64_t used_ = 0;
};

}  // namespace respike
