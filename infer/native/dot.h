// Dot products of rows with vectors, and the packing of vectors for them. Included by isa.h.
namespace falcon {
namespace FALCON_ISA {
namespace {

constexpr int kPlanes = 2;  // accumulators of a row for each vector, so that one need not wait for the other's result

// Products in f32: all formats, all instruction sets.
template <class Row>
struct WideDot {
  using T = typename Row::T;
  using Acc = F32;
  const Packed& x;
  int64_t first;
  template <int kRows, int kBatch>
  FALCON_INLINE void step(int64_t d, const T* const* at, Acc (*acc)[kPlanes * kBatch]) const {
    for (int64_t u = 0; u < kStripe; u += 2 * kLanes) {
      F32 xa[kBatch], xb[kBatch];
      FALCON_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        const float* p = static_cast<const float*>(x.high) + (first + b) * x.stride + d + u;
        xa[b] = load(p), xb[b] = load(p + kLanes);
      }
      FALCON_UNROLL
      for (int r = 0; r < kRows; ++r) {
        F32 wa, wb;
        Row::load2(at[r] + u, wa, wb);
        FALCON_UNROLL
        for (int b = 0; b < kBatch; ++b) acc[r][2 * b] += wa * xa[b], acc[r][2 * b + 1] += wb * xb[b];
      }
    }
  }
  FALCON_INLINE float finish(const Acc* acc, int) const { return total(acc[0] + acc[1]); }
};

#if defined(FALCON_BF16)
// Two bf16 products in each lane of an instruction. The vector is split into the sum of two bf16 planes, which keep 16 of its 24 bits.
// Memory bandwidth is the limit, so that the second product takes no additional time.
struct BF16Dot {
  using T = uint16_t;
  using Acc = __m512;
  const Packed& x;
  int64_t first;
  template <int kRows, int kBatch>
  FALCON_INLINE void step(int64_t d, const T* const* at, Acc (*acc)[kPlanes * kBatch]) const {
    for (int64_t u = 0; u < kStripe; u += 32) {
      __m512bh high[kBatch], low[kBatch];
      FALCON_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        const int64_t i = (first + b) * x.stride + d + u;
        high[b] = (__m512bh)_mm512_loadu_si512(static_cast<const uint16_t*>(x.high) + i);
        low[b] = (__m512bh)_mm512_loadu_si512(static_cast<const uint16_t*>(x.low) + i);
      }
      FALCON_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const __m512bh w = (__m512bh)_mm512_loadu_si512(at[r] + u);
        FALCON_UNROLL
        for (int b = 0; b < kBatch; ++b) {
          acc[r][2 * b] = _mm512_dpbf16_ps(acc[r][2 * b], w, high[b]);
          acc[r][2 * b + 1] = _mm512_dpbf16_ps(acc[r][2 * b + 1], w, low[b]);
        }
      }
    }
  }
  FALCON_INLINE float finish(const Acc* acc, int) const { return total((F32)acc[0] + (F32)acc[1]); }
};
#endif

#if defined(FALCON_VNNI)
constexpr int64_t kI8Columns = (1 << 17) - 1;  // 128 * 128 * columns < 2^31

// Four int8 products in each lane of an instruction. The vector is rounded to 16 bits and split into two int8 planes. One operand of
// the instruction is unsigned: it gets w + 128, and 128 * sum(x) is subtracted at the end. Lanes and their sum may overflow: modulo
// 2^32 the result is exact if the sum of w * x of a plane fits 32 bits, which holds for up to kI8Columns columns.
struct I8Dot {
  using T = int8_t;
  using Acc = __m512i;
  const Packed& x;
  int64_t first;
  template <int kRows, int kBatch>
  FALCON_INLINE void step(int64_t d, const T* const* at, Acc (*acc)[kPlanes * kBatch]) const {
    const __m512i offset = _mm512_set1_epi8(-128);
    __m512i w[kRows];
    FALCON_UNROLL
    for (int r = 0; r < kRows; ++r) w[r] = _mm512_xor_si512(_mm512_loadu_si512(at[r]), offset);
    FALCON_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int64_t i = (first + b) * x.stride + d;
      const __m512i high = _mm512_loadu_si512(static_cast<const int8_t*>(x.high) + i);
      const __m512i low = _mm512_loadu_si512(static_cast<const int8_t*>(x.low) + i);
      FALCON_UNROLL
      for (int r = 0; r < kRows; ++r) {
        acc[r][2 * b] = _mm512_dpbusd_epi32(acc[r][2 * b], w[r], high);
        acc[r][2 * b + 1] = _mm512_dpbusd_epi32(acc[r][2 * b + 1], w[r], low);
      }
    }
  }
  FALCON_INLINE float finish(const Acc* acc, int b) const {
    const int32_t* sum = x.sum + 2 * (first + b);
    const auto plane = [](__m512i lanes, int32_t sum) {
      return static_cast<int32_t>(static_cast<uint32_t>(_mm512_reduce_add_epi32(lanes)) - 128u * static_cast<uint32_t>(sum));
    };
    return x.unit[first + b] * static_cast<float>(256ll * plane(acc[0], sum[0]) + plane(acc[1], sum[1]));
  }
};
#endif

// A copy of the columns after the last whole stripe, padded with zeros: reading a whole stripe there could exceed the buffer.
template <class T, int kRows>
struct LastStripe {
  T columns[kRows][kStripe];
  const T* at[kRows];
  LastStripe(const T* const* rows, int64_t from, int64_t to) {
    std::memset(columns, 0, sizeof(columns));
    for (int r = 0; r < kRows; ++r) std::memcpy(columns[r], rows[r] + from, (to - from) * sizeof(T)), at[r] = columns[r];
  }
};

template <class Dot, int kRows, int kBatch, bool kFetch>
FALCON_INLINE void dot_tile(const Matrix& w, const Dot& dot, int64_t i, int64_t end, float* y, int64_t y_stride) {
  using T = typename Dot::T;
  const T *rows[kRows], *next[kRows];
  row_pointers<T, kRows>(w, i, end, rows, next);
  typename Dot::Acc acc[kRows][kPlanes * kBatch] = {};
  each_stripe<T, kRows, kFetch>(rows, next, w.columns, [&](int64_t d, const T* const* at) __attribute__((always_inline)) {
    dot.template step<kRows, kBatch>(d, at, acc);
  });
  const int64_t whole = w.columns / kStripe * kStripe;
  if (whole < w.columns) dot.template step<kRows, kBatch>(whole, LastStripe<T, kRows>(rows, whole, w.columns).at, acc);
  for (int r = 0; r < kRows; ++r) {
    const float scale = w.scale ? w.scale[w.row(i + r)] : 1.0f;
    for (int b = 0; b < kBatch; ++b) y[(dot.first + b) * y_stride + i + r] = scale * dot.finish(&acc[r][kPlanes * b], b);
  }
}

template <class Dot, int kRows, int kBatch, bool kFetch = true>
FALCON_INLINE void dot_rows(const Matrix& w, const Packed& x, int64_t first, int64_t begin, int64_t end, float* y,
                            int64_t y_stride) {
  const Dot dot{x, first};
  int64_t i = begin;
  for (; i + kRows <= end; i += kRows) dot_tile<Dot, kRows, kBatch, kFetch>(w, dot, i, end, y, y_stride);
  for (; i < end; ++i) dot_tile<Dot, 1, kBatch, kFetch>(w, dot, i, end, y, y_stride);
}

// Rows are multiplied in groups that stay in the cache for all vectors of the batch. A result is the same, bit for bit, however many
// rows and vectors are multiplied together.
template <class Dot>
void dot(const Matrix& w, const Packed& x, int64_t begin, int64_t end, float* y, int64_t y_stride) {
  // Short consecutive rows are one stream: the CPU's own prefetcher is faster.
  const bool stream = !w.index && w.columns * static_cast<int64_t>(sizeof(typename Dot::T)) <= kAhead;
  if (x.batch == 1 && stream) return dot_rows<Dot, 1, 1, false>(w, x, 0, begin, end, y, y_stride);
  if (x.batch == 1) return dot_rows<Dot, kTile, 1>(w, x, 0, begin, end, y, y_stride);
  for (int64_t i = begin; i < end; i += kTile) {
    const int64_t stop = i + kTile < end ? i + kTile : end;
    int64_t b = 0;
    for (; b + 4 <= x.batch; b += 4) dot_rows<Dot, 2, 4>(w, x, b, i, stop, y, y_stride);
    for (; b + 2 <= x.batch; b += 2) dot_rows<Dot, 4, 2>(w, x, b, i, stop, y, y_stride);
    for (; b < x.batch; ++b) dot_rows<Dot, kTile, 1>(w, x, b, i, stop, y, y_stride);
  }
}

// ---- packing of vectors

#if defined(FALCON_VNNI)
constexpr int kNotFinite = 0x99;  // classes of _mm512_fpclass_ps_mask: quiet and signalling NaN, both infinities

// Rounds v to 16 bits in two int8 planes, v = step * (256 * high + low), padded with zeros to a multiple of 16. Writes the planes'
// sums to sum[0] and sum[1]. Returns step, or NaN, with nothing written, if a number is NaN or infinite.
inline float split_i8(const float* v, int64_t n, int8_t* high, int8_t* low, int32_t* sum) {
  const auto some = [&](int64_t i) { return n - i >= 16 ? 0xffff : (1u << (n - i)) - 1; };
  __m512 largest = _mm512_setzero_ps();
  __mmask16 endless = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 x = _mm512_maskz_loadu_ps(some(i), v + i);
    endless = _kor_mask16(endless, _mm512_fpclass_ps_mask(x, kNotFinite));
    largest = _mm512_max_ps(largest, _mm512_abs_ps(x));
  }
  if (endless) return NAN;
  const float most = _mm512_reduce_max_ps(largest), step = most > 1e-30f ? most / 32639.0f : 1.0f, steps = 1.0f / step;
  __m512i high_sum = _mm512_setzero_si512(), low_sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 16) {
    const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(some(i), v + i), _mm512_set1_ps(steps));
    const __m512i q = _mm512_cvtps_epi32(scaled);
    const __m512i h = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
    const __m512i l = _mm512_sub_epi32(q, _mm512_slli_epi32(h, 8));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high + i), _mm512_cvtepi32_epi8(h));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low + i), _mm512_cvtepi32_epi8(l));
    high_sum = _mm512_add_epi32(high_sum, h), low_sum = _mm512_add_epi32(low_sum, l);
  }
  sum[0] = _mm512_reduce_add_epi32(high_sum), sum[1] = _mm512_reduce_add_epi32(low_sum);
  return step;
}
#endif

int64_t packed_bytes(int format, int64_t columns, int64_t batch) {
  return batch * ((format == kI8 ? 6 : 4) * padded(columns) + 16) + 64;
}

template <class Row>
Packed pack_wide(const float* x, int64_t columns, int64_t batch, void* scratch) {
  const int64_t stride = padded(columns);
  float* out = static_cast<float*>(scratch);
  std::memset(out, 0, batch * stride * sizeof(float));
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t d = 0; d < columns; ++d) out[b * stride + place<Row>(d)] = x[b * columns + d];
  return Packed{out, nullptr, nullptr, nullptr, nullptr, stride, batch};
}

#if defined(FALCON_BF16)
Packed pack_bf16(const float* x, int64_t columns, int64_t batch, void* scratch) {
  const int64_t stride = padded(columns);
  uint16_t* high = static_cast<uint16_t*>(scratch);
  uint16_t* low = high + batch * stride;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t d = 0; d < stride; d += 16) {
      const int64_t left = columns - d;
      const __mmask16 mask = left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
      const __m512 v = _mm512_maskz_loadu_ps(mask, x + b * columns + d);
      const __m256i h = (__m256i)_mm512_cvtneps_pbh(v);
      const __m512 rounded = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
      const __mmask16 finite = _knot_mask16(_mm512_fpclass_ps_mask(rounded, kNotFinite));  // infinite - infinite would be NaN
      const __m512 rest = _mm512_maskz_sub_ps(finite, v, rounded);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + b * stride + d), h);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + b * stride + d), (__m256i)_mm512_cvtneps_pbh(rest));
    }
  return Packed{high, low, nullptr, nullptr, nullptr, stride, batch};
}
#endif

#if defined(FALCON_VNNI)
Packed pack_i8(const float* x, int64_t columns, int64_t batch, void* scratch) {
  const int64_t stride = padded(columns);
  float* wide = static_cast<float*>(scratch);
  float* unit = wide + batch * stride;
  int32_t* sum = reinterpret_cast<int32_t*>(unit + batch);
  int8_t* high = reinterpret_cast<int8_t*>(sum + 2 * batch);
  int8_t* low = high + batch * stride;
  std::memset(sum, 0, 2 * batch * sizeof(int32_t) + 2 * batch * stride);
  for (int64_t b = 0; b < batch; ++b) {
    const float* v = x + b * columns;
    unit[b] = columns > kI8Columns ? NAN : split_i8(v, columns, high + b * stride, low + b * stride, sum + 2 * b);
    if (!std::isnan(unit[b])) continue;
    std::memset(wide + b * stride, 0, stride * sizeof(float));
    std::memcpy(wide + b * stride, v, columns * sizeof(float));
  }
  return Packed{high, low, unit, sum, wide, stride, batch};
}

// In int8; in f32 for the vectors that pack_i8 marked with a unit of NaN.
void dot_i8(const Matrix& w, const Packed& x, int64_t begin, int64_t end, float* y, int64_t y_stride) {
  int64_t marked = 0;
  for (int64_t b = 0; b < x.batch; ++b) marked += std::isnan(x.unit[b]);
  if (marked < x.batch) dot<I8Dot>(w, x, begin, end, y, y_stride);
  for (int64_t b = 0; marked && b < x.batch; ++b)
    if (std::isnan(x.unit[b])) {
      const Packed one{x.wide + b * x.stride, nullptr, nullptr, nullptr, nullptr, x.stride, 1};
      dot<WideDot<I8Row>>(w, one, begin, end, y + b * y_stride, y_stride);
    }
}
#endif

Packed pack_x(int format, const float* x, int64_t columns, int64_t batch, void* scratch) {
  switch (format) {
    case kBF16:
#if defined(FALCON_BF16)
      return pack_bf16(x, columns, batch, scratch);
#else
      return pack_wide<BF16Row>(x, columns, batch, scratch);
#endif
#if defined(FALCON_VNNI)
    case kI8:
      return pack_i8(x, columns, batch, scratch);
#endif
    default:
      return pack_wide<F32Row>(x, columns, batch, scratch);
  }
}

}  // namespace
}  // namespace FALCON_ISA
}  // namespace falcon
