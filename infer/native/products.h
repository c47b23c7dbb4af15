// Matrix products in bf16 for AVX512-BF16, on one thread: rows of pairs, each pair broadcast, times panels of 16 to 64 columns.
// Included by one instruction set's file, after isa.h.
namespace falcon {
namespace FALCON_ISA {
namespace {

constexpr int kProductRows = 6;         // times 4 vectors of sums fill the registers
constexpr int64_t kPanel = 64;          // columns of a panel; the last ones may have fewer vectors
constexpr int64_t kDepth = 1024;        // of a block that stays in the L2 cache
constexpr int64_t kBlockRows = 48;      // rows that share a block of a panel

// acc[r * stride + column] += sum over `pairs` of row r times the panel, whose pairs lie [pairs, kVectors * 16].
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

// n numbers as bf16; int8 is exact in it. n a multiple of 16.
FALCON_INLINE void to_bf16(const int8_t* in, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 v = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), (__m256i)_mm512_cvtneps_pbh(v));
  }
}

void round_bf16(const float* in, const float* scale, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 some = n - i >= 16 ? 0xffff : (1u << (n - i)) - 1;
    __m512 v = _mm512_maskz_loadu_ps(some, in + i);
    if (scale) v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(some, scale + i));
    _mm256_mask_storeu_epi16(out + i, some, (__m256i)_mm512_cvtneps_pbh(v));
  }
}

// Columns [first, first + 16 * vectors) of a panel, from vectors x that lie `columns` apart, `batch` of them.
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

// y[t * y_stride + i] = <row i, vector t> for begin <= i < end: panels [first of kPanel columns each] as packed above.
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
      const uint16_t* a = static_cast<const uint16_t*>(w.data) + i * w.columns + k;
      if (format == kI8) {
        for (int64_t r = 0; r < rows; ++r)
          to_bf16(static_cast<const int8_t*>(w.data) + (i + r) * w.columns + k, depth, wide + r * kDepth);
        a = wide;
      }
      for (int64_t t = 0; t < tokens; t += kPanel) {
        const int64_t width = tokens - t < kPanel ? tokens - t : kPanel;
        products(width / 16, a, format == kI8 ? kDepth : w.columns, rows, panels + t * w.columns / 2 + k / 2 * width, depth / 2,
                 acc + t, tokens);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float scale = w.scale ? w.scale[i + r] : 1.0f;
      for (int64_t t = 0; t < batch; ++t) y[t * y_stride + i + r] = scale * acc[r * tokens + t];
    }
  }
}

// y[t * w.columns + d] = sum over all rows m of h[t * w.count + m] * row m [d] for begin <= d < end, begin and end multiples of kPanel.
void rows_sum_product(const Matrix& w, int format, const uint16_t* h, int64_t batch, int64_t begin, int64_t end, float* y,
                      void* scratch) {
  constexpr int64_t kRun = 4 * kPanel;  // columns read together, so that memory is read in pieces worth its while
  uint32_t* panels = static_cast<uint32_t*>(scratch);  // [panels, pairs, kPanel]
  for (int64_t d = begin; d < end; d += kRun) {
    const int64_t width = end - d < kRun ? end - d : kRun;
    for (int64_t t = 0; t < batch; ++t) std::memset(y + t * w.columns + d, 0, width * sizeof(float));
    for (int64_t m = 0; m < w.count; m += kDepth / 2) {
      const int64_t depth = w.count - m < kDepth / 2 ? w.count - m : kDepth / 2;
      for (int64_t k = 0; k < depth; k += 2)
        for (int64_t c = 0; c < width; c += 16) {
          __m256i pair[2];
          for (int i = 0; i < 2; ++i) {
            const int64_t at = (m + k + i) * w.columns + d + c;
            uint16_t numbers[16];
            if (format == kI8)
              to_bf16(static_cast<const int8_t*>(w.data) + at, 16, numbers);
            else
              std::memcpy(numbers, static_cast<const uint16_t*>(w.data) + at, sizeof(numbers));
            std::memcpy(&pair[i], numbers, sizeof(numbers));
          }
          const __m512i low = _mm512_cvtepu16_epi32(pair[0]), high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(pair[1]), 16);
          _mm512_storeu_si512(panels + c / kPanel * kPanel * (kDepth / 4) + k / 2 * kPanel + c % kPanel, _mm512_or_si512(low, high));
        }
      for (int64_t c = 0; c < width; c += kPanel)
        products<4>(h + m, w.count, batch, panels + c * (kDepth / 4), depth / 2, y + d + c, w.columns);
    }
  }
}

int64_t product_bytes(int64_t batch) { return kBlockRows * ((batch + 15) * 4 + kDepth * 2) + 4 * kPanel * kDepth + 64; }

}  // namespace

const Products kProducts = {pack_panel, rows_product, round_bf16, rows_sum_product, product_bytes};

}  // namespace FALCON_ISA
}  // namespace falcon
