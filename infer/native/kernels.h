// The kernels of one instruction set. Each runs on one thread, on buffers that its caller has checked.
#pragma once

#include <cstdint>

namespace falcon {

enum Format { kF32 = 0, kBF16 = 1, kF16 = 2, kI8 = 3, kI4 = 4, kFormats = 5 };

constexpr int64_t kStripe = 64;  // columns handled at a time; packed inputs are padded with zeros to a multiple of it

inline int64_t padded(int64_t columns) { return (columns + kStripe - 1) / kStripe * kStripe; }
// Bytes of a number of a row, in all formats but int4.
inline int64_t item_bytes(int format) { return format == kF32 ? 4 : format == kI8 ? 1 : 2; }

// int4 rows: 4 bits a column, in blocks of 512 columns, each of 16 runs of 32; see int4.h.
constexpr int64_t kInt4Block = 512, kInt4Runs = 16, kInt4Run = 32, kInt4CodeBytes = kInt4Block / 2;
inline int64_t int4_blocks(int64_t columns) { return (columns + kInt4Block - 1) / kInt4Block; }

// Sums and products of int4 rows process a block's columns in the order of the codes in memory: 64 bytes after 64 bytes, and of each
// 64 bytes the lowest four bits of every 32-bit lane, then the next four. Returns the column at position `place` of that order.
inline int64_t int4_column(int64_t place) {
  const int64_t block = place / kInt4Block, bytes = place % kInt4Block / 128, bits = place / kInt4Runs % 8, run = place % kInt4Runs;
  return block * kInt4Block + run * kInt4Run + 8 * bytes + bits % 2 * 4 + bits / 2;
}

// Columns that `unpack` reorders together; and the number of columns of a sum before `unpack`, a multiple of that.
inline int64_t unpacked_columns(int format) { return format == kI4 ? kInt4Block : kStripe; }
inline int64_t sum_width(int format, int64_t columns) {
  const int64_t unit = unpacked_columns(format);
  return (columns + unit - 1) / unit * unit;
}

// A matrix, or a selection of its rows by `index`.
struct Matrix {
  const void* data;
  const float* scale;    // int8: one for each row. int4: the 16 levels. Else null
  const int32_t* index;  // null: every row in order
  int64_t count;         // number of rows, or of entries of `index`
  int64_t columns;
  int64_t row_bytes;
  int64_t group;  // int4: columns that share a scale

  int64_t row(int64_t position) const { return index ? index[position] : position; }
};

// Vectors in the column order and number format in which one instruction set multiplies them with rows of one format. A plane is an
// array of `batch` vectors of `stride` numbers, padded with zeros.
struct Packed {
  const void* high;    // plane: the vectors, or the upper half of their bits
  const void* low;     // plane: the lower half of their bits; null if there is none
  const float* unit;   // int8 planes: a vector is unit * (256 * high + low); NaN if it must be multiplied in f32, in int4 too
  const int32_t* sum;  // int8 planes: sums of each vector's `high` and `low`
  const float* wide;   // int8 planes: plane of the vectors in f32, written where unit is NaN. int4: the unchanged vectors
  int64_t stride;
  int64_t batch;
};

// Queries of one sequence and KV head, and a part of the cache's positions.
struct Attention {
  const float* q;  // [queries, width]
  int64_t queries, width;
  const void *k, *v;               // position 0; positions are `stride` numbers apart
  int64_t stride;
  const float *k_scale, *v_scale;  // int8: the factor of each position, `scale_stride` apart; else null
  int64_t scale_stride;
  const int64_t* length;     // of each query: the positions before it are attended to
  const float* const* bias;  // of each query: a bias for every position; null without
  float softmax_scale;
  int64_t begin, end;  // the part
  float *out, *most, *sum;
};

struct Kernels {
  bool (*supported)();

  // Bytes of scratch that `pack_x` needs for `batch` vectors of `columns`.
  int64_t (*packed_bytes)(int format, int64_t columns, int64_t batch);
  Packed (*pack_x)(int format, const float* x, int64_t columns, int64_t batch, void* scratch);
  // y[b * y_stride + i] = <row i, x_b> for begin <= i < end.
  void (*dot[kFormats])(const Matrix& w, const Packed& x, int64_t begin, int64_t end, float* y, int64_t y_stride);

  // Bytes of scratch that `sum` needs for so many rows.
  int64_t (*sum_bytes)(int64_t columns, int64_t rows, int64_t batch);
  // acc[b * sum_width(format, w.columns) + place of d] = sum of h[b * h_stride + i] * row i [d] over begin <= i < end. The result of a
  // vector is the same, bit for bit, whatever other vectors are in the batch, and with or without rows whose h is 0.
  void (*sum[kFormats])(const Matrix& w, const float* h, int64_t h_stride, int64_t batch, int64_t begin, int64_t end,
                        float* acc, void* scratch);
  // For one vector of the batch: adds up `parts` results of `sum`, which are `part_stride` apart, and writes columns [begin, end) in
  // ascending order; begin is a multiple of unpacked_columns(format).
  void (*unpack[kFormats])(const float* acc, int64_t parts, int64_t part_stride, int64_t begin, int64_t end, float* y);

  // Bytes of scratch that `attend` needs.
  int64_t (*attend_bytes)(int64_t queries, int64_t width, int64_t positions);
  // Attention over a part of one KV head's positions; see attend.h. In the formats of caches: all but int4.
  void (*attend[4])(const Attention& a, float* scratch);

  // Keys of scores, and a search for high keys; see select.h.
  void (*rank)(const float* score, int64_t n, float least, uint32_t* key);
  int64_t (*at_least)(const uint32_t* key, int64_t n, uint32_t least, int32_t* out);

  // Reads rows [begin, end) and returns a number that depends on every byte, to measure the memory bandwidth.
  int64_t (*read)(const Matrix& w, int64_t row_bytes, int64_t begin, int64_t end);
};

// Matrix products with many vectors, of rows in bf16, int8 and int4. A number of columns is a multiple of 64; int4 columns are in the
// order of int4_column. See products.h.
struct Products {
  // Whether there is a product with rows of the format: of rows and vectors, or (transposed) of weights and rows.
  bool (*has)(int format, bool transposed);

  // Bytes of a packed vector; packs vectors [first, first + 16 * vectors), zeros past the batch.
  int64_t (*vector_bytes)(int format, int64_t columns);
  void (*pack_panel)(int format, const float* x, int64_t columns, int64_t batch, int64_t first, int64_t vectors, void* panel);
  void (*dot)(const Matrix& w, int format, const void* panels, int64_t batch, int64_t begin, int64_t end, float* y, int64_t y_stride,
              void* scratch);

  // Bytes of all packed weights; packs those of vector t, for every t up to the next multiple of 16.
  int64_t (*weight_bytes)(int format, int64_t count, int64_t batch);
  void (*pack_weights)(int format, const float* h, const float* scale, int64_t count, int64_t batch, int64_t t, void* blocks);
  void (*sum)(const Matrix& w, int format, const void* weights, int64_t batch, int64_t begin, int64_t end, float* y, void* scratch);

  int64_t (*scratch_bytes)(int64_t batch);
};

extern const Kernels kPlain;
namespace plain_tiles {
extern const Products kProducts;
}
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Vnni;
extern const Kernels kAvx512Bf16;
namespace avx512_vnni {
extern const Products kProducts;
}
namespace avx512_bf16 {
extern const Products kProducts;
}
namespace amx {
extern const Products kProducts;
bool usable();
}
#endif

}  // namespace falcon
