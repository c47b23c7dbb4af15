// Dot products and weighted sums of int4 rows; infer/weights/formats.py describes their layout. Included by isa.h.
//
// A 32-bit lane of a vector has eight codes of one run of 32 columns, so that an integer sum in a lane has one scale, and one vector
// of scales is enough for a block of 512 columns.
namespace falcon {
namespace FALCON_ISA {
namespace {

// A block of a vector, packed for products with int4 rows.
struct Int4Input {
  int8_t value[kInt4Block];   // order of the codes: for every 64 bytes of codes, 64 values for the low, then 64 for the high four bits
  float unit[kInt4Runs];      // a number of the run is its value times this
  int32_t start[kInt4Runs];   // -128 times the sum of the run's values: the levels that they are multiplied with are stored plus 128
};

int64_t packed_int4_bytes(int64_t columns, int64_t batch) {
  return batch * (int4_blocks(columns) * static_cast<int64_t>(sizeof(Int4Input)) + static_cast<int64_t>(sizeof(float))) + 64;
}

// Rounds every run of 32 numbers to int8, with its own unit. Vectors with NaN or infinity are marked, to be multiplied in f32.
Packed pack_int4(const float* x, int64_t columns, int64_t batch, void* scratch) {
  const int64_t blocks = int4_blocks(columns);
  Int4Input* out = static_cast<Int4Input*>(scratch);
  float* marked = reinterpret_cast<float*>(out + batch * blocks);
  for (int64_t b = 0; b < batch; ++b) marked[b] = 0;
  for (int64_t i = 0; i < batch * blocks; ++i)
    for (int64_t l = 0; l < kInt4Runs; ++l) {
      float run[kInt4Run] = {};
      const int64_t first = i % blocks * kInt4Block + l * kInt4Run, left = columns - first;
      if (left > 0) std::memcpy(run, x + i / blocks * columns + first, (left < kInt4Run ? left : kInt4Run) * sizeof(float));
      float largest = 0, zero = 0;
      for (const float v : run) {
        const float size = std::fabs(v);
        largest = size > largest ? size : largest;
        zero += v * 0.0f;
      }
      const bool finite = zero == 0;
      if (!finite) marked[i / blocks] = NAN;
      const float unit = finite && largest > 1e-30f ? largest / 127.0f : 0.0f, steps = unit > 0 ? 1.0f / unit : 0.0f;
      int32_t sum = 0;
      for (int64_t c = 0; c < kInt4Run; ++c) {
        const int32_t value = finite ? static_cast<int32_t>(std::nearbyint(run[c] * steps)) : 0;
        out[i].value[c / 4 * 64 + l * 4 + c % 4] = static_cast<int8_t>(value);
        sum += value;
      }
      out[i].unit[l] = unit, out[i].start[l] = -128 * sum;
    }
  return Packed{out, nullptr, marked, nullptr, x, blocks, batch};
}

// The rows of a tile, and the rows to prefetch.
template <int kRows>
struct Int4Tile {
  const uint8_t *rows[kRows], *next[kRows];
  const int64_t code_bytes;  // of a row, before its scales

  Int4Tile(const Matrix& w, int64_t first, int64_t end) : code_bytes(int4_blocks(w.columns) * kInt4CodeBytes) {
    for (int r = 0; r < kRows; ++r) {
      const int64_t here = first + r < end ? first + r : first, then = here + kRows < w.count ? here + kRows : here;
      rows[r] = static_cast<const uint8_t*>(w.data) + w.row(here) * w.row_bytes;
      next[r] = static_cast<const uint8_t*>(w.data) + w.row(then) * w.row_bytes;
    }
  }

  FALCON_INLINE const uint8_t* scales(int r) const { return rows[r] + code_bytes; }

  // Prefetches one block's bytes, scales included, of row r of the next tile.
  template <int kGroup>
  FALCON_INLINE void fetch(int r, int64_t block) const {
    constexpr int64_t bytes = kInt4CodeBytes + 2 * kInt4Block / kGroup;
    const char* p = reinterpret_cast<const char*>(next[r]) + block * bytes;
    FALCON_UNROLL
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(p + line, 0, 1);
  }
};

// The 16 levels as unsigned bytes, plus 128.
FALCON_INLINE void int4_levels(const float* levels, uint8_t* out) {
  for (int i = 0; i < 16; ++i) out[i] = static_cast<uint8_t>(static_cast<int>(levels[i]) + 128);
}

#if defined(FALCON_AVX512)
// The scales of the 16 runs of a block.
template <int kGroup>
FALCON_INLINE __m512 int4_scale_lanes(const uint8_t* scales, int64_t block) {
  if constexpr (kGroup == kInt4Run)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales) + block));
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales) + block);
  return _mm512_cvtph_ps(_mm256_set_m128i(_mm_unpackhi_epi16(h, h), _mm_unpacklo_epi16(h, h)));
}
#endif

#if !defined(FALCON_VNNI)
// The scales of the 16 runs of a block.
template <int kGroup>
FALCON_INLINE void int4_scales(const uint8_t* scales, int64_t block, float* out) {
  constexpr int kRuns = kGroup / kInt4Run, kScales = kInt4Runs / kRuns;
  uint16_t bits[kInt4Runs];
  std::memcpy(bits, scales + block * kScales * 2, kScales * 2);
  for (int i = kScales - 1; i >= 0; --i)
    for (int r = 0; r < kRuns; ++r) bits[i * kRuns + r] = bits[i];
  widen<F16Row>(bits, kInt4Runs, out);
}
#endif

// ---- dot products

#if defined(FALCON_VNNI)

template <int kGroup, int kRows, int kBatch>
FALCON_INLINE void dot_int4_tile(const Matrix& w, const Int4Input* x, int64_t x_stride, int64_t i, int64_t end, float* y,
                                 int64_t y_stride) {
  const Int4Tile<kRows> tile(w, i, end);
  alignas(16) uint8_t bytes[16];
  int4_levels(w.scale, bytes);
  const __m512i levels = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
  const __m512i low_bits = _mm512_set1_epi8(15);
  const int64_t blocks = int4_blocks(w.columns);
  __m512 acc[kRows][kBatch];
  for (int r = 0; r < kRows; ++r)
    for (int b = 0; b < kBatch; ++b) acc[r][b] = _mm512_setzero_ps();
  for (int64_t k = 0; k < blocks; ++k) {
    __m512i sum[kRows][kBatch];
    FALCON_UNROLL
    for (int r = 0; r < kRows; ++r) {
      tile.template fetch<kGroup>(r, k);
      FALCON_UNROLL
      for (int b = 0; b < kBatch; ++b) sum[r][b] = _mm512_loadu_si512(x[b * x_stride + k].start);
    }
    FALCON_UNROLL
    for (int j = 0; j < 4; ++j) {
      FALCON_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const __m512i codes = _mm512_loadu_si512(tile.rows[r] + k * kInt4CodeBytes + 64 * j);
        const __m512i low = _mm512_shuffle_epi8(levels, _mm512_and_si512(codes, low_bits));
        const __m512i high = _mm512_shuffle_epi8(levels, _mm512_and_si512(_mm512_srli_epi16(codes, 4), low_bits));
        FALCON_UNROLL
        for (int b = 0; b < kBatch; ++b) {
          const int8_t* values = x[b * x_stride + k].value + 128 * j;
          sum[r][b] = _mm512_dpbusd_epi32(sum[r][b], low, _mm512_loadu_si512(values));
          sum[r][b] = _mm512_dpbusd_epi32(sum[r][b], high, _mm512_loadu_si512(values + 64));
        }
      }
    }
    FALCON_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const __m512 scale = int4_scale_lanes<kGroup>(tile.scales(r), k);
      FALCON_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        const __m512 products = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][b]), _mm512_loadu_ps(x[b * x_stride + k].unit));
        acc[r][b] = _mm512_fmadd_ps(products, scale, acc[r][b]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int b = 0; b < kBatch; ++b) y[b * y_stride + i + r] = _mm512_reduce_add_ps(acc[r][b]);
}

#else

// The integer sums of the 16 runs of a block.
FALCON_INLINE void int4_block_sums(const uint8_t* codes, const Int4Input& x, const uint8_t* levels, int32_t* sums) {
#if defined(FALCON_F16C) || defined(FALCON_AVX512)  // these instruction sets include AVX2
  const __m128i from_128 = _mm_sub_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels)), _mm_set1_epi8(-128));
  const __m256i signed_levels = _mm256_broadcastsi128_si256(from_128);
  const __m256i low_bits = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  FALCON_UNROLL
  for (int half = 0; half < 2; ++half) {
    __m256i sum = _mm256_setzero_si256();
    FALCON_UNROLL
    for (int j = 0; j < 4; ++j) {
      const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 64 * j + 32 * half));
      FALCON_UNROLL
      for (int high = 0; high < 2; ++high) {
        const __m256i code = _mm256_and_si256(high ? _mm256_srli_epi16(both, 4) : both, low_bits);
        const __m256i level = _mm256_shuffle_epi8(signed_levels, code);
        const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.value + 128 * j + 64 * high + 32 * half));
        // A pair fits 16 bits: |level| is at most 128 and |value| at most 127.
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(level), _mm256_sign_epi8(value, level));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
      }
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 8 * half), sum);
  }
#else
  for (int l = 0; l < kInt4Runs; ++l) sums[l] = x.start[l];
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 64; ++i) {
      const uint8_t both = codes[64 * j + i];
      sums[i / 4] += levels[both & 15] * x.value[128 * j + i] + levels[both >> 4] * x.value[128 * j + 64 + i];
    }
#endif
}

template <int kGroup, int kRows, int kBatch>
FALCON_INLINE void dot_int4_tile(const Matrix& w, const Int4Input* x, int64_t x_stride, int64_t i, int64_t end, float* y,
                                 int64_t y_stride) {
  const Int4Tile<kRows> tile(w, i, end);
  uint8_t levels[16];
  int4_levels(w.scale, levels);
  const int64_t blocks = int4_blocks(w.columns);
  float acc[kRows][kBatch][kInt4Runs] = {};
  for (int64_t k = 0; k < blocks; ++k)
    for (int r = 0; r < kRows; ++r) {
      tile.template fetch<kGroup>(r, k);
      float scale[kInt4Runs];
      int4_scales<kGroup>(tile.scales(r), k, scale);
      for (int b = 0; b < kBatch; ++b) {
        const Int4Input& block = x[b * x_stride + k];
        int32_t sums[kInt4Runs];
        int4_block_sums(tile.rows[r] + k * kInt4CodeBytes, block, levels, sums);
        for (int l = 0; l < kInt4Runs; ++l) acc[r][b][l] += scale[l] * (static_cast<float>(sums[l]) * block.unit[l]);
      }
    }
  for (int r = 0; r < kRows; ++r)
    for (int b = 0; b < kBatch; ++b) {
      float sum = 0;
      for (const float lane : acc[r][b]) sum += lane;
      y[b * y_stride + i + r] = sum;
    }
}

#endif

template <int kGroup, int kRows, int kBatch>
FALCON_INLINE void dot_int4_rows(const Matrix& w, const Packed& x, int64_t first, int64_t begin, int64_t end, float* y,
                                 int64_t y_stride) {
  const Int4Input* input = static_cast<const Int4Input*>(x.high) + first * x.stride;
  float* out = y + first * y_stride;
  int64_t i = begin;
  for (; i + kRows <= end; i += kRows) dot_int4_tile<kGroup, kRows, kBatch>(w, input, x.stride, i, end, out, y_stride);
  for (; i < end; ++i) dot_int4_tile<kGroup, 1, kBatch>(w, input, x.stride, i, end, out, y_stride);
}

// A result is the same, bit for bit, however many rows and vectors are multiplied together: integer sums are exact, and blocks are
// added up in order.
template <int kGroup>
void dot_int4_group(const Matrix& w, const Packed& x, int64_t begin, int64_t end, float* y, int64_t y_stride) {
  if (x.batch == 1) return dot_int4_rows<kGroup, kTile, 1>(w, x, 0, begin, end, y, y_stride);
  for (int64_t i = begin; i < end; i += kTile) {
    const int64_t stop = i + kTile < end ? i + kTile : end;
    int64_t b = 0;
    for (; b + 8 <= x.batch; b += 8) dot_int4_rows<kGroup, 2, 8>(w, x, b, i, stop, y, y_stride);
    for (; b + 4 <= x.batch; b += 4) dot_int4_rows<kGroup, 4, 4>(w, x, b, i, stop, y, y_stride);
    for (; b < x.batch; ++b) dot_int4_rows<kGroup, kTile, 1>(w, x, b, i, stop, y, y_stride);
  }
}

// Scalar, for vectors with NaN or infinity.
float dot_int4_wide(const Matrix& w, int64_t position, const float* x) {
  const uint8_t* codes = static_cast<const uint8_t*>(w.data) + w.row(position) * w.row_bytes;
  const uint8_t* scales = codes + int4_blocks(w.columns) * kInt4CodeBytes;
  float sum = 0;
  for (int64_t i = 0; i < int4_blocks(w.columns) * kInt4Block; ++i) {
    const int64_t column = int4_column(i), lane = i / 128 * 16 + i % kInt4Runs, bits = i / kInt4Runs % 8;
    if (column >= w.columns) continue;
    float scale[kLanes];
    uint16_t half[kLanes] = {};
    std::memcpy(half, scales + 2 * (column / w.group), sizeof(*half));
    store(scale, F16Row::load1(half));
    sum += w.scale[codes[4 * lane + bits / 2] >> 4 * (bits % 2) & 15] * scale[0] * x[column];
  }
  return sum;
}

void dot_int4(const Matrix& w, const Packed& x, int64_t begin, int64_t end, float* y, int64_t y_stride) {
  (w.group == kInt4Run ? dot_int4_group<kInt4Run> : dot_int4_group<2 * kInt4Run>)(w, x, begin, end, y, y_stride);
  for (int64_t b = 0; b < x.batch; ++b)
    for (int64_t i = begin; std::isnan(x.unit[b]) && i < end; ++i) y[b * y_stride + i] = dot_int4_wide(w, i, x.wide + b * w.columns);
}

// ---- weighted sums

#if !defined(FALCON_AVX512)
// The levels of a block in f32, in the column order of sums.
FALCON_INLINE void int4_wide_block(const uint8_t* codes, const uint8_t* levels, float* out) {
  for (int j = 0; j < 4; ++j) {
    uint8_t level[2][64];
    const uint8_t* both = codes + 64 * j;
    for (int i = 0; i < 64; ++i) level[0][i] = levels[both[i] & 15], level[1][i] = levels[both[i] >> 4];
    for (int nibble = 0; nibble < 8; ++nibble)
      for (int l = 0; l < kInt4Runs; ++l)
        out[128 * j + 16 * nibble + l] = static_cast<float>(level[nibble % 2][4 * l + nibble / 2] - 128);
  }
}
#endif

template <int kGroup, int kRows>
FALCON_INLINE void sum_int4_tile(const Matrix& w, const float* h, int64_t h_stride, int64_t batch, int64_t i, int64_t end,
                                 float* acc) {
  const Int4Tile<kRows> tile(w, i, end);
  const int64_t blocks = int4_blocks(w.columns);
#if defined(FALCON_AVX512)
  const __m512 levels = _mm512_loadu_ps(w.scale);
  for (int64_t k = 0; k < blocks; ++k) {
    __m512 scale[kRows];
    FALCON_UNROLL
    for (int r = 0; r < kRows; ++r) {
      tile.template fetch<kGroup>(r, k);
      scale[r] = int4_scale_lanes<kGroup>(tile.scales(r), k);
    }
    for (int64_t b = 0; b < batch; ++b) {
      __m512 weight[kRows];
      FALCON_UNROLL
      for (int r = 0; r < kRows; ++r) weight[r] = _mm512_mul_ps(_mm512_set1_ps(h[b * h_stride + i + r]), scale[r]);
      float* out = acc + (b * blocks + k) * kInt4Block;
      for (int j = 0; j < 4; ++j) {
        __m512i codes[kRows];
        FALCON_UNROLL
        for (int r = 0; r < kRows; ++r) codes[r] = _mm512_loadu_si512(tile.rows[r] + k * kInt4CodeBytes + 64 * j);
        FALCON_UNROLL
        for (int nibble = 0; nibble < 8; ++nibble) {
          float* p = out + 128 * j + 16 * nibble;
          __m512 sum = _mm512_loadu_ps(p);
          FALCON_UNROLL
          for (int r = 0; r < kRows; ++r)  // the permutation uses only the lowest four bits
            sum = _mm512_fmadd_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(codes[r], 4 * nibble), levels), weight[r], sum);
          _mm512_storeu_ps(p, sum);
        }
      }
    }
  }
#else
  uint8_t levels[16];
  int4_levels(w.scale, levels);
  for (int64_t k = 0; k < blocks; ++k)
    for (int r = 0; r < kRows; ++r) {
      tile.template fetch<kGroup>(r, k);
      float scale[kInt4Runs], wide[kInt4Block];
      int4_scales<kGroup>(tile.scales(r), k, scale);
      int4_wide_block(tile.rows[r] + k * kInt4CodeBytes, levels, wide);
      for (int64_t b = 0; b < batch; ++b) {
        float weight[kInt4Runs], *out = acc + (b * blocks + k) * kInt4Block;
        for (int l = 0; l < kInt4Runs; ++l) weight[l] = h[b * h_stride + i + r] * scale[l];
        for (int64_t u = 0; u < kInt4Block; u += kLanes)
          store(out + u, load(out + u) + load(wide + u) * load(weight + u % kInt4Runs));
      }
    }
#endif
}

template <int kGroup>
void sum_int4_group(const Matrix& w, const float* h, int64_t h_stride, int64_t batch, int64_t begin, int64_t end, float* acc) {
  int64_t i = begin;
  for (; i + kTile <= end; i += kTile) sum_int4_tile<kGroup, kTile>(w, h, h_stride, batch, i, end, acc);
  for (; i < end; ++i) sum_int4_tile<kGroup, 1>(w, h, h_stride, batch, i, end, acc);
}

// In f32, adding up row after row.
void sum_int4(const Matrix& w, const float* h, int64_t h_stride, int64_t batch, int64_t begin, int64_t end, float* acc, void*) {
  std::memset(acc, 0, batch * int4_blocks(w.columns) * kInt4Block * sizeof(float));
  (w.group == kInt4Run ? sum_int4_group<kInt4Run> : sum_int4_group<2 * kInt4Run>)(w, h, h_stride, batch, begin, end, acc);
}

// As `unpack`, begin a multiple of kInt4Block.
void unpack_int4(const float* acc, int64_t parts, int64_t part_stride, int64_t begin, int64_t end, float* y) {
  for (int64_t d = begin; d < end; d += kInt4Block) {
    float block[kInt4Block], columns[kInt4Block];
    std::memcpy(block, acc + d, sizeof(block));
    for (int64_t i = 1; i < parts; ++i)
      for (int64_t u = 0; u < kInt4Block; u += kLanes) store(block + u, load(block + u) + load(acc + i * part_stride + d + u));
    for (int64_t u = 0; u < kInt4Block; ++u) columns[int4_column(u)] = block[u];
    std::memcpy(y + d, columns, (end - d < kInt4Block ? end - d : kInt4Block) * sizeof(float));
  }
}

}  // namespace
}  // namespace FALCON_ISA
}  // namespace falcon
