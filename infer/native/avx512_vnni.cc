// The row kernels for AVX-512 with int8 dot products, and matrix products in int8.
#include <type_traits>

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif
#define FALCON_ISA avx512_vnni
#define FALCON_VECTOR_BYTES 64
#define FALCON_AVX512
#define FALCON_VNNI
#define FALCON_UNSIGNED_ROWS
#include "isa.h"
#include "panels.h"
#include "products.h"
#include "registers.h"

FALCON_KERNELS(kAvx512Vnni,
               kAvx512.supported() && __builtin_cpu_supports("avx512vnni"))

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
