// The row kernels for the instructions that every CPU of the architecture has: SSE2 on x86-64, NEON on 64-bit ARM.
#define FALCON_ISA plain
#define FALCON_VECTOR_BYTES 16
#include "isa.h"

FALCON_KERNELS(kPlain, true)
