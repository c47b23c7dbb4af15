#include "checks.h"

#include <algorithm>

namespace falcon {

ffi::Error invalid(const std::string& text) { return ffi::Error::InvalidArgument("falcon_relu: " + text); }

int format_of(ffi::DataType type) {
  switch (type) {
    case ffi::F32: return kF32;
    case ffi::BF16:
    case ffi::U16: return kBF16;  // its bits
    case ffi::F16: return kF16;
    case ffi::S8: return kI8;
    default: return -1;
  }
}

std::string check_matrix(const ffi::AnyBuffer& w, const Floats& scale, const Ints* index, const Ints* count, Matrix* out) {
  if (format_of(w.element_type()) < 0) return "rows must be f32, bf16, f16 or int8";
  if (w.dimensions().size() != 2) return "rows must be a matrix";
  const int64_t rows = w.dimensions()[0], columns = w.dimensions()[1];
  if (columns < 1 || columns > (1 << 19)) return "rows must be 1 to 524288 wide, not " + std::to_string(columns);
  const int64_t scales = scale.element_count();
  if (scales != 0 && scales != rows) return std::to_string(scales) + " scales for " + std::to_string(rows) + " rows";
  if (format_of(w.element_type()) == kI8 && scales != rows) return "int8 rows need scales";
  *out = Matrix{w.untyped_data(), scales ? scale.typed_data() : nullptr, nullptr, rows, columns};
  if (!index) return "";
  if (count->element_count() != 1) return "count must be one number";
  const int64_t capacity = index->element_count(), n = count->typed_data()[0];
  if (n < 0 || n > capacity) return "count " + std::to_string(n) + " of " + std::to_string(capacity) + " indices";
  const int32_t* ids = index->typed_data();
  uint32_t largest = 0;  // as unsigned numbers, negative ones are larger than any row
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, static_cast<uint32_t>(ids[i]));
  if (n && largest >= rows)
    return "an index is " + std::to_string(static_cast<int32_t>(largest)) + ", the matrix has " + std::to_string(rows) + " rows";
  out->index = ids, out->count = n;
  return "";
}

}  // namespace falcon
