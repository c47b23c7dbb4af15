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
    case ffi::U8: return kI4;
    default: return -1;
  }
}

namespace {

std::string check_int4(const Floats& levels, int64_t columns, int64_t group, int64_t row_bytes) {
  if (group != kInt4Run && group != 2 * kInt4Run) return "groups of int4 rows must have 32 or 64 columns";
  if (columns < 1 || row_bytes != int4_blocks(columns) * (kInt4CodeBytes + 2 * kInt4Block / group))
    return std::to_string(row_bytes) + " bytes are no int4 row of " + std::to_string(columns) + " columns";
  if (levels.element_count() != 16) return "int4 rows need 16 levels";
  for (int i = 0; i < 16; ++i) {
    const float level = levels.typed_data()[i];
    if (!(level >= -128.0f && level <= 127.0f) || level != static_cast<float>(static_cast<int>(level)))
      return "levels of int4 rows must be whole numbers from -128 to 127";
  }
  return "";
}

}  // namespace

std::string check_matrix(const ffi::AnyBuffer& w, const Floats& scale, const Ints* index, const Ints* count, int64_t columns,
                         int64_t group, Matrix* out) {
  const int format = format_of(w.element_type());
  if (format < 0) return "rows must be f32, bf16, f16, int8 or int4";
  if (w.dimensions().size() != 2) return "rows must be a matrix";
  const int64_t rows = w.dimensions()[0];
  if (format != kI4) columns = w.dimensions()[1];
  if (columns < 1 || columns > (1 << 19)) return "rows must be 1 to 524288 wide, not " + std::to_string(columns);
  const int64_t scales = scale.element_count();
  if (format == kI4) {
    if (auto wrong = check_int4(scale, columns, group, w.dimensions()[1]); !wrong.empty()) return wrong;
  } else if (scales != (format == kI8 ? rows : 0)) {
    return std::to_string(scales) + " scales for " + std::to_string(rows) + " rows of " + (format == kI8 ? "int8" : "floats");
  }
  const int64_t row_bytes = format == kI4 ? static_cast<int64_t>(w.dimensions()[1]) : columns * item_bytes(format);
  *out = Matrix{w.untyped_data(), scales ? scale.typed_data() : nullptr, nullptr, rows, columns, row_bytes, group};
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
