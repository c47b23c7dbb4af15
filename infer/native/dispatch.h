// The choice of the instruction set.
#pragma once

#include "kernels.h"

namespace falcon {

// The kernels in use: those of the best instruction set that this CPU has, unless another was chosen.
const Kernels& kernels();

// The matrix products of the instruction set in use; null where it has none.
const Products* products();

}  // namespace falcon
