// The source of the kernels, compiled once for each instruction set. The including file defines FALCON_ISA (a namespace),
// FALCON_VECTOR_BYTES, the available instructions (FALCON_F16C, FALCON_AVX512, FALCON_VNNI, FALCON_BF16), and the compiler's target.
// Nothing here may have external linkage: the linker would keep one copy of a function, compiled for any of the instruction sets.
#include <cmath>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

#include "lanes.h"

#include "attend.h"
#include "dot.h"
#include "read.h"
#include "select.h"
#include "sum.h"

#include "int4.h"

namespace falcon {
namespace FALCON_ISA {
namespace {

int64_t used_packed_bytes(int format, int64_t columns, int64_t batch) {
  return format == kI4 ? packed_int4_bytes(columns, batch) : packed_bytes(format, columns, batch);
}
Packed used_pack(int format, const float* x, int64_t columns, int64_t batch, void* scratch) {
  return format == kI4 ? pack_int4(x, columns, batch, scratch) : pack_x(format, x, columns, batch, scratch);
}

#if defined(FALCON_BF16)
using UsedBF16Dot = BF16Dot;
#else
using UsedBF16Dot = WideDot<BF16Row>;
#endif
#if defined(FALCON_VNNI)
constexpr auto used_i8_dot = dot_i8;
constexpr auto used_i8_sum = sum_i8;
constexpr auto used_i8_unpack = unpack<transposed_place>;
#else
constexpr auto used_i8_dot = dot<WideDot<I8Row>>;
constexpr auto used_i8_sum = sum<I8Row>;
constexpr auto used_i8_unpack = unpack<place<I8Row>>;
#endif

}  // namespace
}  // namespace FALCON_ISA
}  // namespace falcon

#define FALCON_KERNELS(NAME, SUPPORTED)                                                             \
  namespace falcon {                                                                                \
  const Kernels NAME = {                                                                            \
      [] { return static_cast<bool>(SUPPORTED); },                                                  \
      FALCON_ISA::used_packed_bytes,                                                                   \
      FALCON_ISA::used_pack,                                                                         \
      {FALCON_ISA::dot<FALCON_ISA::WideDot<FALCON_ISA::F32Row>>, FALCON_ISA::dot<FALCON_ISA::UsedBF16Dot>, \
       FALCON_ISA::dot<FALCON_ISA::WideDot<FALCON_ISA::F16Row>>, FALCON_ISA::used_i8_dot, FALCON_ISA::dot_int4}, \
      FALCON_ISA::sum_bytes,                                                                        \
      {FALCON_ISA::sum<FALCON_ISA::F32Row>, FALCON_ISA::sum<FALCON_ISA::BF16Row>,                   \
       FALCON_ISA::sum<FALCON_ISA::F16Row>, FALCON_ISA::used_i8_sum, FALCON_ISA::sum_int4},         \
      {FALCON_ISA::unpack<FALCON_ISA::place<FALCON_ISA::F32Row>>, FALCON_ISA::unpack<FALCON_ISA::place<FALCON_ISA::BF16Row>>, \
       FALCON_ISA::unpack<FALCON_ISA::place<FALCON_ISA::F16Row>>, FALCON_ISA::used_i8_unpack, FALCON_ISA::unpack_int4}, \
      FALCON_ISA::attend_bytes,                                                                     \
      {FALCON_ISA::attend<FALCON_ISA::F32Row>, FALCON_ISA::attend<FALCON_ISA::BF16Row>, FALCON_ISA::attend<FALCON_ISA::F16Row>, \
       FALCON_ISA::attend<FALCON_ISA::I8Row>}, \
      FALCON_ISA::rank,                                                                             \
      FALCON_ISA::at_least,                                                                         \
      FALCON_ISA::read,                                                                             \
  };                                                                                                \
  }
