// Both operands of matrix products, rounded and put into the order in which they are multiplied. Depth (the direction that is summed
// over) is counted in words of 4 bytes: two numbers in bf16, four in int8. Included after isa.h.
namespace falcon {
namespace FALCON_ISA {
namespace {

constexpr int64_t kPanel = 64;          // columns in a panel; the last panel may have fewer, a multiple of 16
constexpr int64_t kDepth = 1024;        // columns of rows that are multiplied before the next; vectors in int8 have a unit for each
constexpr int64_t kSumBytes = 1024;     // bytes of a vector's weights that are multiplied before the next
constexpr int64_t kSumStride = kSumBytes + 64;  // from one vector's to the next: a power of two would evict lines of the L1 cache
constexpr int64_t kRun = 4 * kPanel;    // columns of rows that are added up together: runs of 256 bytes are read fast

// Whether vectors are rounded to int8 for products with rows of a format, else to bf16. A sum of int4 rows has a scale for each row and
// group of columns, which cannot become part of a weight.
constexpr bool in_int8(int format, bool transposed) { return format == kI8 || (format == kI4 && !transposed); }

#if defined(FALCON_AVX512)
FALCON_INLINE __mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xffff : (1u << n) - 1; }
#endif

// out = the bf16 closest to in * scale; scale may be null.
inline void round_bf16(const float* in, const float* scale, int64_t n, uint16_t* out) {
#if defined(FALCON_BF16)
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 some = first_lanes(n - i);
    __m512 v = _mm512_maskz_loadu_ps(some, in + i);
    if (scale) v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(some, scale + i));
    _mm256_mask_storeu_epi16(out + i, some, (__m256i)_mm512_cvtneps_pbh(v));
  }
#else
  for (int64_t i = 0; i < n; ++i) {
    const float v = scale ? in[i] * scale[i] : in[i];
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof(bits));
    out[i] = static_cast<uint16_t>(v == v ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : bits >> 16 | 0x40);
  }
#endif
}

// in * scale rounded to int8 times the returned unit; scale may be null. Returns NaN, and zeros, if a number is NaN or infinite.
inline float round_i8(const float* in, const float* scale, int64_t n, int8_t* out, int32_t* sum) {
  float largest = 0;
  bool finite = true;
#if defined(FALCON_VNNI)
  const auto read = [&](int64_t i) {
    const __m512 v = _mm512_maskz_loadu_ps(first_lanes(n - i), in + i);
    return scale ? _mm512_mul_ps(v, _mm512_maskz_loadu_ps(first_lanes(n - i), scale + i)) : v;
  };
  __m512 most = _mm512_setzero_ps();
  __mmask16 endless = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 v = read(i);
    endless = _kor_mask16(endless, _mm512_fpclass_ps_mask(v, kNotFinite));
    most = _mm512_max_ps(most, _mm512_abs_ps(v));
  }
  largest = _mm512_reduce_max_ps(most), finite = !endless;
#else
  for (int64_t i = 0; i < n; ++i) {
    const float v = scale ? in[i] * scale[i] : in[i];
    finite &= v * 0.0f == 0, largest = std::fabs(v) > largest ? std::fabs(v) : largest;
  }
#endif
  *sum = 0;
  std::memset(out, 0, n);
  if (!finite) return NAN;
  if (largest < 1e-30f) return 0.0f;
  const float unit = largest / 127.0f, steps = 127.0f / largest;
#if defined(FALCON_VNNI)
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(read(i), _mm512_set1_ps(steps)));
    _mm_mask_storeu_epi8(out + i, first_lanes(n - i), _mm512_cvtepi32_epi8(q));
    total = _mm512_add_epi32(total, q);
  }
  *sum = _mm512_reduce_add_epi32(total);
#else
  for (int64_t i = 0; i < n; ++i) {
    const float v = scale ? in[i] * scale[i] : in[i];
    out[i] = static_cast<int8_t>(std::nearbyint(v * steps)), *sum += out[i];
  }
#endif
  return unit;
}

// to[16 * r + t] = from[t * from_stride + r] for r < words, t < 16.
inline void transpose_words(const uint32_t* from, int64_t from_stride, int64_t words, uint32_t* to) {
  for (int64_t t = 0; t < 16; t += kLanes)
    for (int64_t r = 0; r < words; r += kLanes) {
      F32 v[kLanes];
      FALCON_UNROLL
      for (int i = 0; i < kLanes; ++i) v[i] = load(reinterpret_cast<const float*>(from + (t + i) * from_stride + r));
      transpose(v);
      FALCON_UNROLL
      for (int i = 0; i < kLanes; ++i) store(reinterpret_cast<float*>(to + (r + i) * 16 + t), v[i]);
    }
}

// ---- vectors as panels: for every kDepth columns [vectors / 16, words, 16], so that 16 words of 16 vectors are one run of 1 KiB. In
// int8 each vector's unit there follows, and -128 times the sum of its numbers.

int64_t vector_bytes(int format, int64_t columns) {
  return in_int8(format, false) ? columns + (columns + kDepth - 1) / kDepth * 8 : 2 * columns;
}

// The words of the columns from `k` on, a multiple of kDepth, in a panel of `width` vectors.
inline const uint32_t* panel_words(int format, const void* panel, int64_t width, int64_t k) {
  return static_cast<const uint32_t*>(panel) + width * (in_int8(format, false) ? k / 4 + k / kDepth * 2 : k / 2);
}

// Packs vectors [first, first + 16 * vectors) of x, [batch, columns], into a panel; vectors past the batch are 0. columns: a multiple
// of 64.
void pack_panel(int format, const float* x, int64_t columns, int64_t batch, int64_t first, int64_t vectors, void* panel) {
  const int64_t width = 16 * vectors, word_bytes = 4, per_word = in_int8(format, false) ? 4 : 2;
  alignas(64) uint32_t rows[16][kDepth / 2 + 16];
  for (int64_t u = 0; u < width; u += 16)
    for (int64_t k = 0; k < columns; k += kDepth) {
      const int64_t depth = columns - k < kDepth ? columns - k : kDepth, words = depth / per_word;
      uint32_t* to = const_cast<uint32_t*>(panel_words(format, panel, width, k));
      for (int64_t t = 0; t < 16; ++t) {
        const float* from = x + (first + u + t) * columns + k;
        const bool there = first + u + t < batch;
        float unit = 0;
        int32_t sum = 0;
        if (!there)
          std::memset(rows[t], 0, words * word_bytes);
        else if (per_word == 4)
          unit = round_i8(from, nullptr, depth, reinterpret_cast<int8_t*>(rows[t]), &sum);
        else
          round_bf16(from, nullptr, depth, reinterpret_cast<uint16_t*>(rows[t]));
        sum *= -128;
        if (per_word == 2) continue;
        std::memcpy(to + words * width + u + t, &unit, sizeof(unit));
        std::memcpy(to + (words + 1) * width + u + t, &sum, sizeof(sum));
      }
      transpose_words(rows[0], sizeof(rows[0]) / word_bytes, words, to + u * words);
    }
}

// ---- weights of a sum: blocks [kSumBytes of depth, vectors, kSumStride bytes], and then in int8 the units [block, vector]

inline int64_t sum_depth(int format) { return in_int8(format, true) ? kSumBytes : kSumBytes / 2; }
inline int64_t sum_blocks(int format, int64_t count) { return (count + sum_depth(format) - 1) / sum_depth(format); }
inline int64_t whole_tiles(int64_t vectors) { return (vectors + 15) / 16 * 16; }

int64_t weight_bytes(int format, int64_t count, int64_t batch) {
  return sum_blocks(format, count) * whole_tiles(batch) * (kSumStride + static_cast<int64_t>(sizeof(float)));
}

inline float* weight_units(int format, void* blocks, int64_t count, int64_t batch) {
  return reinterpret_cast<float*>(static_cast<uint8_t*>(blocks) + sum_blocks(format, count) * whole_tiles(batch) * kSumStride);
}

// Rounds the weights of vector t, times the rows' scales. Vectors past the batch have weights of 0.
void pack_weights(int format, const float* h, const float* scale, int64_t count, int64_t batch, int64_t t, void* blocks) {
  const int64_t depth = sum_depth(format), tokens = whole_tiles(batch);
  float* unit = weight_units(format, blocks, count, batch);
  for (int64_t m = 0; m < count; m += depth) {
    const int64_t n = count - m < depth ? count - m : depth, block = m / depth;
    uint8_t* out = static_cast<uint8_t*>(blocks) + (block * tokens + t) * kSumStride;
    std::memset(out, 0, kSumBytes);
    int32_t sum;
    if (in_int8(format, true)) {
      unit[block * tokens + t] = t < batch ? round_i8(h + m, scale + m, n, reinterpret_cast<int8_t*>(out), &sum) : 0.0f;
#if defined(FALCON_UNSIGNED_ROWS)
      for (int64_t i = 0; i < kSumBytes; ++i) out[i] ^= 0x80;
#endif
    } else if (t < batch) {
      round_bf16(h + m, nullptr, n, reinterpret_cast<uint16_t*>(out));
    }
  }
}

// ---- rows

// Columns [first, first + count) of an int4 row, times `factor`, in the order of int4_column; multiples of 128.
inline void int4_wide(const Matrix& w, const uint8_t* row, int64_t first, int64_t count, float factor, float* out) {
  const uint8_t* scales = row + int4_blocks(w.columns) * kInt4CodeBytes;
  for (int64_t c = 0; c < count; c += 128) {
    const int64_t block = (first + c) / kInt4Block;
#if defined(FALCON_AVX512)
    const __m512 levels = _mm512_loadu_ps(w.scale);
    const __m512 stored = w.group == kInt4Run ? int4_scale_lanes<kInt4Run>(scales, block) : int4_scale_lanes<2 * kInt4Run>(scales, block);
    const __m512 scale = _mm512_mul_ps(stored, _mm512_set1_ps(factor));
    const __m512i codes = _mm512_loadu_si512(row + (first + c) / 2);
    FALCON_UNROLL
    for (int bits = 0; bits < 8; ++bits) {
      const __m512 level = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * bits), levels);
      _mm512_storeu_ps(out + c + 16 * bits, _mm512_mul_ps(level, scale));
    }
#else
    float scale[kInt4Runs];
    (w.group == kInt4Run ? int4_scales<kInt4Run> : int4_scales<2 * kInt4Run>)(scales, block, scale);
    for (int l = 0; l < kInt4Runs; ++l) {
      const uint8_t* codes = row + (first + c) / 2 + 4 * l;
      for (int bits = 0; bits < 8; ++bits)
        out[c + 16 * bits + l] = w.scale[codes[bits / 2] >> 4 * (bits % 2) & 15] * (scale[l] * factor);
    }
#endif
  }
}

// Rounds columns [first, first + count) of an int4 row, multiples of 512, to int8 times the returned unit: small against the steps
// between levels. 
inline float int4_as_i8(const Matrix& w, const uint8_t* row, int64_t first, int64_t count, int8_t* out) {
  const uint8_t* scales = row + int4_blocks(w.columns) * kInt4CodeBytes;
  float most = 0, highest = 0;
  for (int i = 0; i < 16; ++i) highest = std::fabs(w.scale[i]) > highest ? std::fabs(w.scale[i]) : highest;
  const int64_t groups = count / w.group;
  uint16_t bits[kDepth / kInt4Run];
  float scale[kDepth / kInt4Run];
  std::memcpy(bits, scales + first / w.group * 2, groups * 2);
  widen<F16Row>(bits, groups, scale);
  for (int64_t i = 0; i < groups; ++i) most = std::fabs(scale[i]) > most ? std::fabs(scale[i]) : most;
  most *= highest;
  const float unit = most / 127.0f, steps = most > 1e-30f ? 127.0f / most : 0.0f;
  float wide[kInt4Block];
  for (int64_t k = 0; k < count; k += kInt4Block) {
    int4_wide(w, row, first + k, kInt4Block, steps, wide);
#if defined(FALCON_AVX512)
    FALCON_UNROLL
    for (int64_t u = 0; u < kInt4Block; u += 16)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k + u), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_loadu_ps(wide + u))));
#else
    for (int64_t u = 0; u < kInt4Block; ++u) out[k + u] = static_cast<int8_t>(std::nearbyint(wide[u]));
#endif
  }
  return unit;
}

// Columns [first, first + count) of a row as bf16: in the row itself, or converted into `room`. A level of an int4 row times its scale
// is rounded; their columns are in the order of int4_column, both multiples of 128, `count` at most 512.
inline const uint16_t* as_bf16(const Matrix& w, int format, int64_t row, int64_t first, int64_t count, uint16_t* room) {
  const uint8_t* data = static_cast<const uint8_t*>(w.data) + row * w.row_bytes;
  if (format == kBF16) return reinterpret_cast<const uint16_t*>(data) + first;
  float wide[kInt4Block];
  int4_wide(w, data, first, count, 1.0f, wide);
  round_bf16(wide, nullptr, count, room);
  return room;
}

// Interleaves `width` columns of two rows in bf16, so that each word is a pair, and writes every 16 of them `size` words after the last.
inline void pack_pair(const uint16_t* even, const uint16_t* odd, int64_t width, uint32_t* to, int64_t size) {
  for (int64_t c = 0; c < width; c += 16, to += size)
    for (int64_t u = 0; u < 16; u += kLanes) {
      const U32 low = __builtin_convertvector(*reinterpret_cast<const LooseU16*>(even + c + u), U32);
      const U32 high = __builtin_convertvector(*reinterpret_cast<const LooseU16*>(odd + c + u), U32);
      *reinterpret_cast<LooseU32*>(to + u) = low | high << 16;
    }
}

// The position in a panel of column d, as pack_four writes it.
FALCON_INLINE int64_t panel_place(int64_t d) { return d / 4 % 4 * 16 + d / 16 * 4 + d % 4; }

// Interleaves `width` columns of four int8 rows likewise, in the column order of panel_place. Where `sums` is not null, adds 128 times
// each column's sum to it.
inline void pack_four(const int8_t* const* rows, int64_t width, uint32_t* to, int64_t size, int32_t* sums) {
  for (int64_t c = 0; c < width; c += kPanel, to += 4 * size) {
#if defined(FALCON_VNNI)
    __m512i w[4], out[4];
    FALCON_UNROLL
    for (int r = 0; r < 4; ++r) w[r] = _mm512_loadu_si512(rows[r] + c);
    const __m512i a = _mm512_unpacklo_epi8(w[0], w[1]), b = _mm512_unpackhi_epi8(w[0], w[1]);
    const __m512i e = _mm512_unpacklo_epi8(w[2], w[3]), f = _mm512_unpackhi_epi8(w[2], w[3]);
    out[0] = _mm512_unpacklo_epi16(a, e), out[1] = _mm512_unpackhi_epi16(a, e);
    out[2] = _mm512_unpacklo_epi16(b, f), out[3] = _mm512_unpackhi_epi16(b, f);
    FALCON_UNROLL
    for (int j = 0; j < 4; ++j) {
      _mm512_storeu_si512(to + j * size, out[j]);
      if (!sums) continue;
      int32_t* sum = sums + c + 16 * j;
      _mm512_storeu_si512(sum, _mm512_dpbusd_epi32(_mm512_loadu_si512(sum), _mm512_set1_epi8(-128), out[j]));
    }
#else
    for (int64_t d = 0; d < kPanel; ++d) {
      uint32_t word = 0;
      for (int r = 0; r < 4; ++r) {
        word |= static_cast<uint32_t>(static_cast<uint8_t>(rows[r][c + d])) << 8 * r;
        if (sums) sums[c + panel_place(d)] += 128 * rows[r][c + d];
      }
      to[panel_place(d) / 16 * size + panel_place(d) % 16] = word;
    }
#endif
  }
}

}  // namespace
}  // namespace FALCON_ISA
}  // namespace falcon
