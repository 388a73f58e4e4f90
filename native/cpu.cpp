#include "cpu.hpp"

#include <stdexcept>

#if RESPIKE_X86
#include <cpuid.h>
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
#endif

}  // namespace

std::map<std::string, bool> cpu_features() {
#if RESPIKE_X86
  __builtin_cpu_init();
  std::map<std::string, bool> features = {
      {"avx2", __builtin_cpu_supports("avx2")},
      {"fma", __builtin_cpu_supports("fma")},
      {"f16c", has_f16c()},
      {"avx512f", __builtin_cpu_supports("avx512f")},
      {"avx512bw", __builtin_cpu_supports("avx512bw")},
      {"avx512dq", __builtin_cpu_supports("avx512dq")},
      {"avx512vl", __builtin_cpu_supports("avx512vl")},
      {"avx512vnni", __builtin_cpu_supports("avx512vnni")},
      {"avx512bf16", __builtin_cpu_supports("avx512bf16")},
  };
#if !defined(__clang__)  // older clang refuses these names at compile time
  features["amx-tile"] = __builtin_cpu_supports("amx-tile");
  features["amx-int8"] = __builtin_cpu_supports("amx-int8");
  features["amx-bf16"] = __builtin_cpu_supports("amx-bf16");
#endif
  return features;
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
  return all({"avx512vnni", "avx512bf16"}) ? Level::avx512bf16 : Level::avx512;
}

}  // namespace

Level best_level() {
  static const Level best = detect_level();
  return best;
}

const char* level_name(Level level) {
  switch (level) {
    case Level::avx512bf16: return "avx512bf16";
    case Level::avx512: return "avx512";
    case Level::avx2: return "avx2";
    case Level::portable: break;
  }
  return "portable";
}

Level checked_level(int level) {
  if (level < 0 || level > static_cast<int>(best_level())) {
    throw std::invalid_argument("CPU level " + std::to_string(level) +
                                " cannot run here; the highest is " + level_name(best_level()));
  }
  return static_cast<Level>(level);
}

}  // namespace respike
