// The row kernels for AVX-512.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define FALCON_ISA avx512
#define FALCON_VECTOR_BYTES 64
#define FALCON_AVX512
#include "isa.h"

FALCON_KERNELS(kAvx512,
               __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
