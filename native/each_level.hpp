// Compiles the file RESPIKE_KERNELS once for each level, inside the level's namespace of vec.hpp.
// RESPIKE_TARGET marks the functions of a level; no include guard, on purpose. Who defines
// RESPIKE_PAIRS gets level avx512bf16 too, whose cells are pairs of bfloat16.

#define RESPIKE_LEVEL portable
#define RESPIKE_TARGET
#include RESPIKE_KERNELS
#undef RESPIKE_LEVEL
#undef RESPIKE_TARGET

#if RESPIKE_X86

#define RESPIKE_LEVEL avx2
#define RESPIKE_TARGET RESPIKE_AVX2
#include RESPIKE_KERNELS
#undef RESPIKE_LEVEL
#undef RESPIKE_TARGET

#define RESPIKE_LEVEL avx512
#define RESPIKE_TARGET RESPIKE_AVX512
#include RESPIKE_KERNELS
#undef RESPIKE_LEVEL
#undef RESPIKE_TARGET

#ifdef RESPIKE_PAIRS
#define RESPIKE_LEVEL avx512bf16
#define RESPIKE_TARGET RESPIKE_AVX512BF16
#include RESPIKE_KERNELS
#undef RESPIKE_LEVEL
#undef RESPIKE_TARGET
#endif

#endif

#undef RESPIKE_KERNELS
