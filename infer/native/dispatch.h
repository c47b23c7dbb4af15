// Which instruction set's kernels are used.
#pragma once

#include "kernels.h"

namespace falcon {

// The kernels in use: the best that this CPU has, unless another set was asked for.
const Kernels& kernels();

// The matrix products of the instruction set in use; null where it has none.
const Products* products();

}  // namespace falcon
