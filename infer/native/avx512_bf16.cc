// The row kernels for AVX-512 with int8 and bf16 dot products, and matrix products in bf16.
#include <type_traits>

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")
#endif
#define FALCON_ISA avx512_bf16
#define FALCON_VECTOR_BYTES 64
#define FALCON_AVX512
#define FALCON_VNNI
#define FALCON_BF16
#define FALCON_UNSIGNED_ROWS
#include "isa.h"
#include "panels.h"
#include "products.h"
#include "registers.h"

FALCON_KERNELS(kAvx512Bf16,
               kAvx512Vnni.supported() && __builtin_cpu_supports("avx512bf16"))

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
