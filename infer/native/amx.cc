// Matrix products in tiles of AMX, bf16 and int8.
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-int8,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-int8,amx-bf16")
#endif
#define FALCON_ISA amx
#define FALCON_VECTOR_BYTES 64
#define FALCON_AVX512
#define FALCON_VNNI
#define FALCON_BF16
#define FALCON_AMX
#include "isa.h"
#include "panels.h"
#include "products.h"
#include "tiles.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace falcon {
namespace amx {

// Whether this CPU has AMX with bf16 and int8, and the kernel lets this process use it: a thread's tiles are 8 KiB that the kernel
// saves only for processes that asked (Linux, arch/x86/xstate).
bool usable() {
#if defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#else
  return false;
#endif
}

}  // namespace amx
}  // namespace falcon
#endif
