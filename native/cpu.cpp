#include "cpu.hpp"

#include <stdexcept>

#if RESPIKE_X86
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace respike {
namespace {

#if RESPIKE_X86
// Asked of the processor itself: older compilers do not know the name. AVX2's own check covers the
// operating system's part.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

// What CPUID says of AMX (leaf 7, register D), or 0 where the operating system does not keep tiles.
unsigned amx_bits() {
  constexpr unsigned tiles = 3u << 17;  // of XCR0: their shapes, and what is in them
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & bit_OSXSAVE) == 0) return 0;
  asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  if ((a & tiles) != tiles) return 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 ? 0 : d;
}

// Linux grants a process the memory for its threads' tiles when it asks, and then for good.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return true;
#endif
}
#endif

}  // namespace

std::map<std::string, bool> cpu_features() {
#if RESPIKE_X86
  __builtin_cpu_init();
  const unsigned amx = amx_bits();
  return {
      {"avx2", __builtin_cpu_supports("avx2")},
      {"fma", __builtin_cpu_supports("fma")},
      {"f16c", has_f16c()},
      {"avx512f", __builtin_cpu_supports("avx512f")},
      {"avx512bw", __builtin_cpu_supports("avx512bw")},
      {"avx512dq", __builtin_cpu_supports("avx512dq")},
      {"avx512vl", __builtin_cpu_supports("avx512vl")},
      {"avx512vnni", __builtin_cpu_supports("avx512vnni")},
      {"avx512bf16", __builtin_cpu_supports("avx512bf16")},
      {"amx-bf16", (amx >> 22 & 1) != 0},
      {"amx-tile", (amx >> 24 & 1) != 0},
      {"amx-int8", (amx >> 25 & 1) != 0},
  };
#else
  return {};
#endif
}

namespace {

Level detect_level() {
  const auto features = cpu_features();
  const auto all = [&features](std::initializer_list<const char*> names) {
    for (const char* name : names) {
      const auto found = features.find(name);
      if (found == features.end() || !found->second) return false;
    }
    return true;
  };
  if (!all({"avx2", "fma", "f16c"})) return Level::portable;
  if (!all({"avx512f", "avx512bw", "avx512dq", "avx512vl"})) return Level::avx2;
  if (!all({"avx512vnni", "avx512bf16"})) return Level::avx512;
#if RESPIKE_X86
  if (all({"amx-tile", "amx-int8", "amx-bf16"}) && may_use_tiles()) return Level::amx;
#endif
  return Level::avx512bf16;
}

}  // namespace

Level best_level() {
  static const Level best = detect_level();
  return best;
}

const char* level_name(Level level) {
  switch (level) {
    case Level::amx_model: return "amx-model";
    case Level::amx: return "amx";
    case Level::avx512bf16: return "avx512bf16";
    case Level::avx512: return "avx512";
    case Level::avx2: return "avx2";
    case Level::portable: break;
  }
  return "portable";
}

Level checked_level(int level) {
  const bool model = level == static_cast<int>(Level::amx_model);
  const int needed = static_cast<int>(model ? Level::avx512bf16 : static_cast<Level>(level));
  if (needed < 0 || needed > static_cast<int>(best_level())) {
    throw std::invalid_argument("CPU level " + std::to_string(level) +
                                " cannot run here; the highest is " + level_name(best_level()));
  }
  return static_cast<Level>(level);
}

}  // namespace respike
