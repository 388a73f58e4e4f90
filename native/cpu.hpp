// What the processor can do, and the instruction sets our kernels are written for.
#pragma once

#include <map>
#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#define RESPIKE_X86 1
// GCC before 14 reports the deliberate _mm512_undefined_*() of its own header (bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
// A function so marked may only be called after checked_level() has allowed its level.
#define RESPIKE_AVX2 __attribute__((target("avx2,fma,f16c")))
#define RESPIKE_AVX512 __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")))
#define RESPIKE_AVX512BF16 \
  __attribute__((          \
      target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")))
#define RESPIKE_AMX                                                                      \
  __attribute__((                                                                        \
      target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,"   \
             "amx-tile,amx-int8,amx-bf16")))
#else
#define RESPIKE_X86 0
#define RESPIKE_AMX
#endif

namespace respike {

// Ascending: a processor that has one has all before it. Kernels compare with >=, so that a level
// needs a kernel only where it is faster: amx for products of many rows. avx512bf16 has VNNI too,
// as every processor with BF16 does. amx_model is for tests and never the best: amx on ModelTiles
// of amx.hpp, wherever avx512bf16 runs.
enum class Level { portable = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3, amx = 4, amx_model = 15 };

// Feature name to whether this processor and its operating system support it.
std::map<std::string, bool> cpu_features();

// The highest level this processor can run.
Level best_level();

const char* level_name(Level level);

// `level` as a Level; throws std::invalid_argument when this processor cannot run it.
Level checked_level(int level);

}  // namespace respike
