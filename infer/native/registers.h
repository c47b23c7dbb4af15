// Products of blocks in vector registers: each word of a row is broadcast and multiplied with 16 to 64 columns of a panel. Included
// after products.h.
namespace falcon {
namespace FALCON_ISA {
namespace {

struct RegisterProduct {
  struct Scope {
  };
  static constexpr int64_t kRowUnit = 1, kBlockRows = 48;  // multiplied while a block of a panel is in the L1 cache
  static constexpr bool kUnsigned = true;
#if defined(FALCON_BF16)
  static constexpr bool kBF16 = true;
#else
  static constexpr bool kBF16 = false;
#endif
  static constexpr int kRows = 6;  // the sums of 6 rows x 4 vectors take 24 of the 32 registers

  static int64_t turns(int64_t rows, int64_t width) { return (rows / kRows + rows % kRows / 2 + rows % 2) * ((width + 63) / 64); }

  template <bool kInt8, int kCount, int kVectors>
  static FALCON_INLINE void multiply_rows(const Blocks& o, int64_t r0, Ahead& ahead) {
    using Sum = std::conditional_t<kInt8, __m512i, __m512>;
    const uint8_t* a = o.a + r0 * o.a_stride;
    float* acc = o.acc + r0 * o.stride;
    Sum sum[kCount][kVectors];
    for (int r = 0; r < kCount; ++r)
      for (int v = 0; v < kVectors; ++v) {
        if constexpr (kInt8) sum[r][v] = _mm512_loadu_si512(o.start + 16 * v);
        else sum[r][v] = _mm512_loadu_ps(acc + r * o.stride + 16 * v);
      }
    for (int64_t k0 = 0; k0 < o.words; k0 += 16) {
      for (int64_t k = k0; k < k0 + 16; ++k) {
        __m512i x[kVectors];
        FALCON_UNROLL
        for (int v = 0; v < kVectors; ++v) x[v] = _mm512_loadu_si512(o.b + (v * o.words + k) * 16);
        FALCON_UNROLL
        for (int r = 0; r < kCount; ++r) {
          int32_t word;
          std::memcpy(&word, a + r * o.a_stride + 4 * k, sizeof(word));
          const __m512i w = _mm512_set1_epi32(word);
          FALCON_UNROLL
          for (int v = 0; v < kVectors; ++v) {
            if constexpr (kInt8) sum[r][v] = _mm512_dpbusd_epi32(sum[r][v], w, x[v]);
#if defined(FALCON_BF16)
            else sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)x[v], (__m512bh)w);
#endif
          }
        }
      }
      ahead.step();
    }
    for (int r = 0; r < kCount; ++r)
      for (int v = 0; v < kVectors; ++v) {
        float* to = acc + r * o.stride + 16 * v;
        if constexpr (kInt8) {
          __m512 scale = _mm512_loadu_ps(o.column_scale + 16 * v);
          if (o.row_scale) scale = _mm512_mul_ps(scale, _mm512_set1_ps(o.row_scale[r0 + r]));
          _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][v]), scale, _mm512_loadu_ps(to)));
        } else {
          _mm512_storeu_ps(to, sum[r][v]);
        }
      }
    ahead.turn();
  }

  template <bool kInt8, int kVectors>
  static void multiply_panel(const Blocks& o, Ahead& ahead) {
    int64_t r = 0;
    for (; r + kRows <= o.rows; r += kRows) multiply_rows<kInt8, kRows, kVectors>(o, r, ahead);
    for (; r + 2 <= o.rows; r += 2) multiply_rows<kInt8, 2, kVectors>(o, r, ahead);
    for (; r < o.rows; ++r) multiply_rows<kInt8, 1, kVectors>(o, r, ahead);
  }

  template <bool kInt8>
  static void multiply(const Blocks& o, Ahead& ahead) {
    if constexpr (kInt8 || kBF16) {
      switch (o.width / 16) {
        case 1: return multiply_panel<kInt8, 1>(o, ahead);
        case 2: return multiply_panel<kInt8, 2>(o, ahead);
        case 3: return multiply_panel<kInt8, 3>(o, ahead);
        default: return multiply_panel<kInt8, 4>(o, ahead);
      }
    }
  }
};

}  // namespace

const Products kProducts = products_of<RegisterProduct>();

}  // namespace FALCON_ISA
}  // namespace falcon
