// The row kernels for AVX2 with FMA and F16C.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define FALCON_ISA avx2
#define FALCON_VECTOR_BYTES 32
#define FALCON_F16C
#include "isa.h"

FALCON_KERNELS(kAvx2,
               __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))  // every CPU with AVX2 has F16C

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
