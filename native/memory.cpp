#include "kernels.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace respike {

bool advise_huge_pages(void* start, std::size_t bytes) {
#if defined(__linux__)
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<std::uintptr_t>(start);
  const auto first = (address + page - 1) / page * page;
  const auto last = (address + bytes) / page * page;
  if (last <= first) return false;
  return madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE) == 0;
#else
  (void)start, (void)bytes;
  return false;
#endif
}

std::uint64_t read_all(const std::uint64_t* start, std::int64_t words) {
  std::uint64_t found[16] = {};  // independent, so that loads do not wait for each other
  std::int64_t i = 0;
  for (; i + 16 <= words; i += 16) {
    for (int j = 0; j < 16; ++j) found[j] ^= start[i + j];
  }
  for (; i < words; ++i) found[0] ^= start[i];
  for (int j = 1; j < 16; ++j) found[0] ^= found[j];
  return found[0];
}

}  // namespace respike
