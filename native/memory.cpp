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

}  // namespace respike
