// Matrix products in bf16 for AVX512-BF16, on one thread: each pair of numbers of a row is broadcast and multiplied with panels of 16
// to 64 columns. Both are first copied to contiguous memory that fits the L2 cache: rows a power of two apart would evict each
// other. Included by one instruction set's file, after isa.h.
namespace falcon {
namespace FALCON_ISA {
namespace {

constexpr int kProductRows = 6;         // the sums of 6 rows x 4 vectors take 24 of the 32 registers
constexpr int64_t kPanel = 64;          // columns in a panel; the last panel may have fewer
constexpr int64_t kDepth = 1024;        // columns of a block of rows that stays in the L2 cache
constexpr int64_t kBlockRows = 48;      // rows multiplied with a block of a panel while it is in the L1 cache
constexpr int64_t kSumDepth = 512;      // rows of a block that are added up together
constexpr int64_t kRun = 4 * kPanel;    // columns of such a block: 256 contiguous numbers are read fast

// acc[r * stride + column] += sum over `pairs` of row r times the panel, an array of pairs [pairs, kVectors * 16].
template <int kRows, int kVectors>
FALCON_INLINE void product(const uint16_t* a, int64_t a_stride, const uint32_t* panel, int64_t pairs, float* acc, int64_t stride) {
  __m512 sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_loadu_ps(acc + r * stride + 16 * v);
  for (int64_t k = 0; k < pairs; ++k) {
    __m512bh x[kVectors];
    FALCON_UNROLL
    for (int v = 0; v < kVectors; ++v) x[v] = (__m512bh)_mm512_loadu_si512(panel + (k * kVectors + v) * 16);
    FALCON_UNROLL
    for (int r = 0; r < kRows; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + r * a_stride + 2 * k, sizeof(pair));
      const __m512bh w = (__m512bh)_mm512_set1_epi32(pair);
      FALCON_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], x[v], w);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(acc + r * stride + 16 * v, sum[r][v]);
}

template <int kVectors>
void products(const uint16_t* a, int64_t a_stride, int64_t rows, const uint32_t* panel, int64_t pairs, float* acc, int64_t stride) {
  int64_t r = 0;
  for (; r + kProductRows <= rows; r += kProductRows)
    product<kProductRows, kVectors>(a + r * a_stride, a_stride, panel, pairs, acc + r * stride, stride);
  for (; r + 2 <= rows; r += 2) product<2, kVectors>(a + r * a_stride, a_stride, panel, pairs, acc + r * stride, stride);
  for (; r < rows; ++r) product<1, kVectors>(a + r * a_stride, a_stride, panel, pairs, acc + r * stride, stride);
}

void products(int64_t vectors, const uint16_t* a, int64_t a_stride, int64_t rows, const uint32_t* panel, int64_t pairs, float* acc,
              int64_t stride) {
  switch (vectors) {
    case 1: return products<1>(a, a_stride, rows, panel, pairs, acc, stride);
    case 2: return products<2>(a, a_stride, rows, panel, pairs, acc, stride);
    case 3: return products<3>(a, a_stride, rows, panel, pairs, acc, stride);
    default: return products<4>(a, a_stride, rows, panel, pairs, acc, stride);
  }
}

FALCON_INLINE void store_bf16(uint16_t* out, __m512 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(v));
}

// `count` columns of a row from `first` on as bf16: in the row itself, or converted into `room`. int8 is exact in bf16; a level of
// an int4 row times its scale is rounded. int4 columns are in the order of int4_column, first and count multiples of 128.
const uint16_t* as_bf16(const Matrix& w, int format, int64_t row, int64_t first, int64_t count, uint16_t* room) {
  const uint8_t* data = static_cast<const uint8_t*>(w.data) + row * w.row_bytes;
  if (format == kBF16) return reinterpret_cast<const uint16_t*>(data) + first;
  if (format == kI8) {
    for (int64_t c = 0; c < count; c += 16)
      store_bf16(room + c, (__m512)I8Row::load1(reinterpret_cast<const int8_t*>(data) + first + c));
    return room;
  }
  const __m512 levels = _mm512_loadu_ps(w.scale);
  const uint8_t* scales = data + int4_blocks(w.columns) * kInt4CodeBytes;
  for (int64_t c = 0; c < count; c += 128) {
    const int64_t block = (first + c) / kInt4Block;
    const __m512 scale = w.group == kInt4Run ? int4_scale_lanes<kInt4Run>(scales, block) : int4_scale_lanes<2 * kInt4Run>(scales, block);
    const __m512i codes = _mm512_loadu_si512(data + (first + c) / 2);
    FALCON_UNROLL
    for (int bits = 0; bits < 8; ++bits) {
      const __m512 level = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * bits), levels);
      store_bf16(room + c + 16 * bits, _mm512_mul_ps(level, scale));
    }
  }
  return room;
}

void round_bf16(const float* in, const float* scale, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 some = n - i >= 16 ? 0xffff : (1u << (n - i)) - 1;
    __m512 v = _mm512_maskz_loadu_ps(some, in + i);
    if (scale) v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(some, scale + i));
    _mm256_mask_storeu_epi16(out + i, some, (__m256i)_mm512_cvtneps_pbh(v));
  }
}

// Packs vectors [first, first + 16 * vectors) of x, [batch, columns], into a panel; vectors past the batch are 0.
void pack_panel(const float* x, int64_t columns, int64_t batch, int64_t first, int64_t vectors, uint32_t* panel) {
  const int64_t width = 16 * vectors;
  std::vector<uint16_t> row(columns);
  for (int64_t t = 0; t < width; ++t) {
    if (first + t < batch)
      round_bf16(x + (first + t) * columns, nullptr, columns, row.data());
    else
      std::fill(row.begin(), row.end(), 0);
    for (int64_t k = 0; k < columns / 2; ++k) std::memcpy(panel + k * width + t, &row[2 * k], sizeof(uint32_t));
  }
}

// y[t * y_stride + r] = scale[r] * acc[r * stride + t] for r < rows, t < batch, in tiles of 16 x 16.
void store_transposed(const float* acc, int64_t stride, int64_t rows, int64_t batch, const float* scale, float* y, int64_t y_stride) {
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t t = 0; t < batch; t += 16) {
      F32 v[16];
      FALCON_UNROLL
      for (int i = 0; i < 16; ++i) {
        const int64_t row = r + i < rows ? r + i : rows - 1;
        v[i] = load(acc + row * stride + t) * spread(scale ? scale[row] : 1.0f);
      }
      transpose(v);
      const __mmask16 some = rows - r >= 16 ? 0xffff : (1u << (rows - r)) - 1;
      for (int64_t j = 0; j < 16 && t + j < batch; ++j) _mm512_mask_storeu_ps(y + (t + j) * y_stride + r, some, (__m512)v[j]);
    }
}

// y[t * y_stride + i] = <row i, vector t> for begin <= i < end. `panels`: all vectors, as pack_panel packs them, kPanel a panel.
void rows_product(const Matrix& w, int format, const uint32_t* panels, int64_t batch, int64_t begin, int64_t end, float* y,
                  int64_t y_stride, void* scratch) {
  const int64_t tokens = (batch + 15) / 16 * 16;
  float* acc = static_cast<float*>(scratch);                               // [rows, tokens]
  uint16_t* wide = reinterpret_cast<uint16_t*>(acc + kBlockRows * tokens);  // [rows, kDepth]
  for (int64_t i = begin; i < end; i += kBlockRows) {
    const int64_t rows = end - i < kBlockRows ? end - i : kBlockRows;
    std::memset(acc, 0, rows * tokens * sizeof(float));
    for (int64_t k = 0; k < w.columns; k += kDepth) {
      const int64_t depth = w.columns - k < kDepth ? w.columns - k : kDepth;
      const bool stored = format == kBF16;
      for (int64_t r = 0; r < rows && !stored; ++r) as_bf16(w, format, i + r, k, depth, wide + r * kDepth);
      const uint16_t* a = stored ? as_bf16(w, format, i, k, depth, nullptr) : wide;
      for (int64_t t = 0; t < tokens; t += kPanel) {
        const int64_t width = tokens - t < kPanel ? tokens - t : kPanel;
        products(width / 16, a, stored ? w.columns : kDepth, rows, panels + t * w.columns / 2 + k / 2 * width, depth / 2,
                 acc + t, tokens);
      }
    }
    store_transposed(acc, tokens, rows, batch, format == kI8 ? w.scale + i : nullptr, y + i, y_stride);
  }
}

// Rounds the weights of vector t, times the rows' scales, into blocks [m / kSumDepth, batch, kSumDepth]; the last may be shorter.
void pack_weights(const float* h, const float* scale, int64_t count, int64_t batch, int64_t t, uint16_t* blocks) {
  for (int64_t m = 0; m < count; m += kSumDepth) {
    const int64_t depth = count - m < kSumDepth ? count - m : kSumDepth;
    round_bf16(h + m, scale ? scale + m : nullptr, depth, blocks + m * batch + t * depth);
  }
}

// Interleaves `width` columns of two rows, so that each lane is a pair, and writes them to that pair's row of each panel.
void pack_pair(const uint16_t* even, const uint16_t* odd, int64_t width, uint32_t* panels) {
  const auto wide = [](const uint16_t* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); };
  for (int64_t c = 0; c < width; c += kPanel, panels += kPanel * (kSumDepth / 2))
    for (int64_t u = 0; u < kPanel; u += 16)
      _mm512_storeu_si512(panels + u, _mm512_or_si512(wide(even + c + u), _mm512_slli_epi32(wide(odd + c + u), 16)));
}

// y[t * w.columns + d] = sum over all rows m of weight [t, m] * row m [d] for begin <= d < end, begin and end multiples of kPanel, of
// 128 for int4.
void rows_sum(const Matrix& w, int format, const uint16_t* weights, int64_t batch, int64_t begin, int64_t end, float* y,
              void* scratch) {
  uint32_t* panels = static_cast<uint32_t*>(scratch);                    // [panels, pairs, kPanel]
  float* acc = reinterpret_cast<float*>(panels + kRun * kSumDepth / 2);  // [batch, kRun]
  uint16_t even[kRun], odd[kRun];
  for (int64_t d = begin; d < end; d += kRun) {
    const int64_t width = end - d < kRun ? end - d : kRun;
    std::memset(acc, 0, batch * kRun * sizeof(float));
    for (int64_t m = 0; m < w.count; m += kSumDepth) {
      const int64_t depth = w.count - m < kSumDepth ? w.count - m : kSumDepth;
      for (int64_t k = 0; k < depth; k += 2)
        pack_pair(as_bf16(w, format, m + k, d, width, even), as_bf16(w, format, m + k + 1, d, width, odd), width,
                  panels + k / 2 * kPanel);
      for (int64_t c = 0; c < width; c += kPanel)
        products<4>(weights + m * batch, depth, batch, panels + c * (kSumDepth / 2), depth / 2, acc + c, kRun);
    }
    for (int64_t t = 0; t < batch; ++t) std::memcpy(y + t * w.columns + d, acc + t * kRun, width * sizeof(float));
  }
}

int64_t product_bytes(int64_t batch) {
  const int64_t tokens = (batch + 15) / 16 * 16;
  const int64_t dot = kBlockRows * (4 * tokens + 2 * kDepth), sum = 4 * kRun * (kSumDepth / 2 + batch);
  return (dot > sum ? dot : sum) + 64;
}

}  // namespace

const Products kProducts = {pack_panel, rows_product, pack_weights, rows_sum, product_bytes};

}  // namespace FALCON_ISA
}  // namespace falcon
