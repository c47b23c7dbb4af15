// Checks of a call's buffers, and conversion of exceptions: only an ffi::Error may be returned to XLA, nothing may be thrown.
#pragma once

#include <new>
#include <string>
#include <utility>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace falcon {

namespace ffi = xla::ffi;

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
using FloatMatrix = ffi::BufferR2<ffi::F32>;

// An error in the arguments of a call.
ffi::Error invalid(const std::string& text);

// The Format of an element type; -1 for types that rows are not stored in.
int format_of(ffi::DataType type);

// Fills in `out`; returns an error message, or "". `index` and `count`: of a gathered matrix, else null. `columns` and `group`: of
// int4 rows, which cannot be computed from the buffer's shape.
std::string check_matrix(const ffi::AnyBuffer& w, const Floats& scale, const Ints* index, const Ints* count, int64_t columns,
                         int64_t group, Matrix* out);

// kCall with exceptions converted to errors, as XLA calls it.
template <auto kCall>
struct Guarded;

template <class... Args, ffi::Error (*kCall)(Args...)>
struct Guarded<kCall> {
  static ffi::Error call(Args... args) {
    try {
      return kCall(std::move(args)...);
    } catch (const std::bad_alloc&) {
      return ffi::Error(ffi::ErrorCode::kResourceExhausted, "falcon_relu: not enough memory for a kernel's buffers");
    } catch (const std::exception& error) {
      return ffi::Error::Internal(std::string("falcon_relu: ") + error.what());
    }
  }
};

}  // namespace falcon
