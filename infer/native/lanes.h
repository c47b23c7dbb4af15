// The row kernels, written once over vectors of kBytes bytes and compiled once for each instruction set. The including file
// sets FALCON_ISA (a namespace), FALCON_VECTOR_BYTES, which instructions there are (FALCON_F16C, FALCON_AVX512, FALCON_VNNI,
// FALCON_BF16), and the compiler's target. Nothing here may have external linkage, or the linker could pick one instruction
// set's copy for all.
#include <cmath>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

namespace falcon {
namespace FALCON_ISA {
namespace {

#define FALCON_INLINE inline __attribute__((always_inline))

constexpr int64_t kBytes = FALCON_VECTOR_BYTES;
constexpr int kLanes = kBytes / 4;
constexpr int64_t kAhead = 4096;  // bytes between what is multiplied and what is asked for
#if defined(FALCON_AVX512)
constexpr int kTile = 8;  // rows handled together: more streams for memory, more uses of a loaded input
#else
constexpr int kTile = 4;
#endif
#define FALCON_UNROLL _Pragma("GCC unroll 16")

typedef float F32 __attribute__((vector_size(kBytes)));
typedef uint32_t U32 __attribute__((vector_size(kBytes)));
typedef float LooseF32 __attribute__((vector_size(kBytes), aligned(4), may_alias));
typedef uint32_t LooseU32 __attribute__((vector_size(kBytes), aligned(1), may_alias));
typedef uint16_t LooseU16 __attribute__((vector_size(kBytes / 2), aligned(1), may_alias));

FALCON_INLINE F32 load(const float* p) { return *reinterpret_cast<const LooseF32*>(p); }
FALCON_INLINE void store(float* p, F32 v) { *reinterpret_cast<LooseF32*>(p) = v; }
FALCON_INLINE F32 spread(float v) { return v - F32{}; }
FALCON_INLINE float total(F32 v) {
#if defined(FALCON_AVX512)
  return _mm512_reduce_add_ps((__m512)v);
#endif
  float lanes[kLanes];
  std::memcpy(lanes, &v, kBytes);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// A row format: its number type, how kLanes of them become a vector, and how 2 * kLanes become two fastest. `kPairs`: even and odd columns, instead of
// the first and second half (a bf16 is the upper half of an f32, so a pair needs a shift and a mask only).
struct F32Row {
  using T = float;
  static constexpr bool kPairs = false;
  static FALCON_INLINE F32 load1(const T* p) { return load(p); }
  static FALCON_INLINE void load2(const T* p, F32& a, F32& b) { a = load1(p), b = load1(p + kLanes); }
};

struct BF16Row {
  using T = uint16_t;
  static constexpr bool kPairs = true;
  static FALCON_INLINE F32 load1(const T* p) {
    return (F32)(__builtin_convertvector(*reinterpret_cast<const LooseU16*>(p), U32) << 16);
  }
  static FALCON_INLINE void load2(const T* p, F32& a, F32& b) {
    const U32 pair = *reinterpret_cast<const LooseU32*>(p);
    a = (F32)(pair << 16), b = (F32)(pair & 0xffff0000u);
  }
};

struct F16Row {
  using T = uint16_t;
  static constexpr bool kPairs = false;
  static FALCON_INLINE F32 load1(const T* p) {
#if defined(FALCON_AVX512)
    return (F32)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(FALCON_F16C)
    return (F32)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
    return (F32)vcvt_f32_f16(vld1_f16(reinterpret_cast<const __fp16*>(p)));
#else
    U32 bits;
    for (int i = 0; i < kLanes; ++i) bits[i] = p[i];
    // The exponent moves to its place in an f32 and is rebiased; where it is 0 there is no leading one, which is taken off again.
    // No f32 subnormal may occur on the way: XLA's threads flush them.
    const U32 magnitude = (bits & 0x7fffu) << 13;
    const F32 normal = (F32)(magnitude + (112u << 23));
    const F32 subnormal = (F32)(magnitude + (113u << 23)) - spread(0x1p-14f);
    const U32 small = (U32)(magnitude < (1u << 23));
    return (F32)(((U32)subnormal & small) | ((U32)normal & ~small) | ((bits & 0x8000u) << 16));
#endif
  }
  static FALCON_INLINE void load2(const T* p, F32& a, F32& b) { a = load1(p), b = load1(p + kLanes); }
};

struct I8Row {
  using T = int8_t;
  static constexpr bool kPairs = false;
  static FALCON_INLINE F32 load1(const T* p) {
#if defined(FALCON_AVX512)
    return (F32)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(FALCON_F16C)
    return (F32)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    F32 v;
    for (int i = 0; i < kLanes; ++i) v[i] = p[i];
    return v;
#endif
  }
  static FALCON_INLINE void load2(const T* p, F32& a, F32& b) { a = load1(p), b = load1(p + kLanes); }
};

// Where column `d` of a stripe stands in a packed vector of the format.
template <class Row>
FALCON_INLINE int64_t place(int64_t d) {
  if (!Row::kPairs) return d;
  const int64_t unit = d / (2 * kLanes) * (2 * kLanes), within = d - unit;
  return unit + within / 2 + (within & 1) * kLanes;
}

template <class T>
FALCON_INLINE void fetch_stripe(const T* p) {
  FALCON_UNROLL
  for (size_t line = 0; line < sizeof(T); ++line)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + 64 * line, 0, 1);  // not to L1, which is full of inputs
}

// Calls body(d) for d, d + kStripe, ... < end; returns where it stopped. A stripe of int8 is one vector: without unrolling, every
// third instruction would be about the rows' pointers.
template <class T, class Body>
FALCON_INLINE int64_t stripes(int64_t d, int64_t end, Body&& body) {
  if constexpr (sizeof(T) == 1) {
    _Pragma("GCC unroll 4")
    for (; d < end; d += kStripe) body(d);
  } else {
    for (; d < end; d += kStripe) body(d);
  }
  return d;
}

// Calls step(first column, row pointers there) for every whole stripe of kRows rows. kFetch: asking for what comes kAhead bytes
// later, first in the same rows and then in the `next` ones.
template <class T, int kRows, bool kFetch = true, class Step>
FALCON_INLINE void each_stripe(const T* const* rows, const T* const* next, int64_t columns, Step&& step) {
  constexpr int64_t ahead = kAhead / sizeof(T) / kStripe * kStripe;
  const int64_t whole = columns / kStripe * kStripe, inside = whole > ahead ? whole - ahead : 0;
  const T* at[kRows];
  const int64_t near = stripes<T>(0, inside, [&](int64_t d) __attribute__((always_inline)) {
    FALCON_UNROLL
    for (int r = 0; r < kRows; ++r) {
      at[r] = rows[r] + d;
      if constexpr (kFetch) fetch_stripe(at[r] + ahead);
    }
    step(d, at);
  });
  stripes<T>(near, whole, [&](int64_t d) __attribute__((always_inline)) {
    FALCON_UNROLL
    for (int r = 0; r < kRows; ++r) {
      at[r] = rows[r] + d;
      if constexpr (kFetch) fetch_stripe(next[r] + (d - inside));
    }
    step(d, at);
  });
}

// Positions between a tile and the one that it asks for: one tile, or as many short rows as 2 * kAhead bytes hold.
template <class T, int kRows>
FALCON_INLINE int64_t tile_ahead(int64_t columns) {
  const int64_t tiles = 2 * kAhead / (columns * static_cast<int64_t>(sizeof(T)) * kRows);
  return kRows * (tiles > 1 ? tiles : 1);
}

// Pointers to the rows of a tile and of the one ahead, which the same thread most likely takes; past `end` any rows.
template <class T, int kRows>
FALCON_INLINE void row_pointers(const Matrix& w, int64_t first, int64_t end, const T** rows, const T** next) {
  const int64_t ahead = tile_ahead<T, kRows>(w.columns);
  for (int r = 0; r < kRows; ++r) {
    const int64_t here = first + r < end ? first + r : first, then = here + ahead < w.count ? here + ahead : here;
    rows[r] = static_cast<const T*>(w.data) + w.row(here) * w.columns;
    next[r] = static_cast<const T*>(w.data) + w.row(then) * w.columns;
    if (w.index && w.scale) __builtin_prefetch(w.scale + w.row(then));
  }
}

// ---- dot products of rows with vectors

// Multiplies in f32: any format on any instruction set. A row has kPlanes accumulators a vector, so that one
// sum's latency hides behind the other; kRows1 rows are best taken together for a single vector.
template <class Row>
struct WideDot {
  using T = typename Row::T;
  using Acc = F32;
  static constexpr int kPlanes = 2, kRows1 = kTile;
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
// Two bf16 products a lane and instruction. The vector is split in two bf16 planes, so that 16 of its 24 bits count: the second
// product costs nothing, since memory is the limit.
struct BF16Dot {
  using T = uint16_t;
  using Acc = __m512;
  static constexpr int kPlanes = 2, kRows1 = kTile;
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
// Four int8 products a lane and instruction. The vector is rounded to 16 bits, split in two int8 planes. The instruction wants
// one side unsigned: w + 128 is, and 128 * sum(x) is taken off at the end. Sums are exact below 2^19 columns.
struct I8Dot {
  using T = int8_t;
  using Acc = __m512i;
  static constexpr int kPlanes = 2, kRows1 = kTile;
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
    const int64_t high = _mm512_reduce_add_epi32(acc[0]) - 128ll * sum[0];
    const int64_t low = _mm512_reduce_add_epi32(acc[1]) - 128ll * sum[1];
    return x.unit[first + b] * static_cast<float>(256 * high + low);
  }
};
#endif

// The columns past the last whole stripe, followed by zeros: reading a whole stripe there could leave the buffer.
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
  typename Dot::Acc acc[kRows][Dot::kPlanes * kBatch] = {};
  each_stripe<T, kRows, kFetch>(rows, next, w.columns, [&](int64_t d, const T* const* at) __attribute__((always_inline)) {
    dot.template step<kRows, kBatch>(d, at, acc);
  });
  const int64_t whole = w.columns / kStripe * kStripe;
  if (whole < w.columns) dot.template step<kRows, kBatch>(whole, LastStripe<T, kRows>(rows, whole, w.columns).at, acc);
  for (int r = 0; r < kRows; ++r) {
    const float scale = w.scale ? w.scale[w.row(i + r)] : 1.0f;
    for (int b = 0; b < kBatch; ++b) y[(dot.first + b) * y_stride + i + r] = scale * dot.finish(&acc[r][Dot::kPlanes * b], b);
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

// Groups of rows that stay in the cache while all vectors of the batch pass over them.
template <class Dot>
void dot(const Matrix& w, const Packed& x, int64_t begin, int64_t end, float* y, int64_t y_stride) {
  // Short rows in order are one stream, which the CPU itself is best at asking for ahead.
  const bool stream = !w.index && w.columns * static_cast<int64_t>(sizeof(typename Dot::T)) <= kAhead;
  if (x.batch == 1 && stream) return dot_rows<Dot, 1, 1, false>(w, x, 0, begin, end, y, y_stride);
  if (x.batch == 1) return dot_rows<Dot, Dot::kRows1, 1>(w, x, 0, begin, end, y, y_stride);
  for (int64_t i = begin; i < end; i += kTile) {
    const int64_t stop = i + kTile < end ? i + kTile : end;
    int64_t b = 0;
    for (; b + 4 <= x.batch; b += 4) dot_rows<Dot, 2, 4>(w, x, b, i, stop, y, y_stride);
    for (; b + 2 <= x.batch; b += 2) dot_rows<Dot, 4, 2>(w, x, b, i, stop, y, y_stride);
    for (; b < x.batch; ++b) dot_rows<Dot, Dot::kRows1, 1>(w, x, b, i, stop, y, y_stride);
  }
}

// ---- packing of vectors

#if defined(FALCON_VNNI)
// Rounds v to 16 bits in two int8 planes: v = step * (256 * high + low), 0 from n to the next multiple of 16. Returns step; sums of
// the planes in sum[0..1].
inline float split_i8(const float* v, int64_t n, int8_t* high, int8_t* low, int32_t* sum) {
  const auto some = [&](int64_t i) { return n - i >= 16 ? 0xffff : (1u << (n - i)) - 1; };
  __m512 largest = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16)
    largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_maskz_loadu_ps(some(i), v + i)));
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

int64_t packed_bytes(int, int64_t columns, int64_t batch) { return batch * (4 * padded(columns) + 16) + 64; }

template <class Row>
Packed pack_wide(const float* x, int64_t columns, int64_t batch, void* scratch) {
  const int64_t stride = padded(columns);
  float* out = static_cast<float*>(scratch);
  std::memset(out, 0, batch * stride * sizeof(float));
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t d = 0; d < columns; ++d) out[b * stride + place<Row>(d)] = x[b * columns + d];
  return Packed{out, nullptr, nullptr, nullptr, stride, batch};
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
      const __m512 rest = _mm512_sub_ps(v, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + b * stride + d), h);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + b * stride + d), (__m256i)_mm512_cvtneps_pbh(rest));
    }
  return Packed{high, low, nullptr, nullptr, stride, batch};
}
#endif

#if defined(FALCON_VNNI)
Packed pack_i8(const float* x, int64_t columns, int64_t batch, void* scratch) {
  const int64_t stride = padded(columns);
  float* unit = static_cast<float*>(scratch);
  int32_t* sum = reinterpret_cast<int32_t*>(unit + batch);
  int8_t* high = reinterpret_cast<int8_t*>(sum + 2 * batch);
  int8_t* low = high + batch * stride;
  std::memset(high, 0, 2 * batch * stride);
  for (int64_t b = 0; b < batch; ++b)
    unit[b] = split_i8(x + b * columns, columns, high + b * stride, low + b * stride, sum + 2 * b);
  return Packed{high, low, unit, sum, stride, batch};
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

// ---- weighted sums of rows

int64_t sum_bytes(int64_t rows, int64_t batch) { return batch * (8 * (rows + 16) + 64) + 64; }

template <class Row, int kRows>
FALCON_INLINE void sum_tile(const Matrix& w, const float* weight, int64_t weight_stride, int64_t batch, int64_t i, float* acc) {
  using T = typename Row::T;
  const int64_t stride = padded(w.columns), whole = w.columns / kStripe * kStripe;
  const T *rows[kRows], *next[kRows];
  row_pointers<T, kRows>(w, i, w.count, rows, next);
  const auto step = [&](int64_t d, const T* const* at) __attribute__((always_inline)) {
    for (int64_t u = 0; u < kStripe; u += 2 * kLanes) {
      F32 wa[kRows], wb[kRows];
      FALCON_UNROLL
      for (int r = 0; r < kRows; ++r) Row::load2(at[r] + u, wa[r], wb[r]);
      for (int64_t b = 0; b < batch; ++b) {
        float* p = acc + b * stride + d + u;
        F32 a = load(p), c = load(p + kLanes);
        FALCON_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const F32 h = spread(weight[b * weight_stride + r]);
          a += h * wa[r], c += h * wb[r];
        }
        store(p, a), store(p + kLanes, c);
      }
    }
  };
  each_stripe<T, kRows>(rows, next, w.columns, step);
  if (whole < w.columns) step(whole, LastStripe<T, kRows>(rows, whole, w.columns).at);
}

template <class Row>
void sum(const Matrix& w, const float* h, int64_t h_stride, int64_t batch, int64_t begin, int64_t end, float* acc,
         void* scratch) {
  constexpr int kRows = kTile;
  float* weight = static_cast<float*>(scratch);  // of the tile's rows: h times the row's scale
  std::memset(acc, 0, batch * padded(w.columns) * sizeof(float));
  const auto weigh = [&](int64_t i, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const float scale = w.scale ? w.scale[w.row(i + r)] : 1.0f;
      for (int64_t b = 0; b < batch; ++b) weight[b * kRows + r] = scale * h[b * h_stride + i + r];
    }
  };
  int64_t i = begin;
  for (; i + kRows <= end; i += kRows) {
    weigh(i, kRows);
    sum_tile<Row, kRows>(w, weight, kRows, batch, i, acc);
  }
  for (; i < end; ++i) {
    weigh(i, 1);
    sum_tile<Row, 1>(w, weight, kRows, batch, i, acc);
  }
}

// kPlace(d): where column d of a stripe stands in a sum.
template <int64_t (*kPlace)(int64_t)>
void unpack(const float* acc, int64_t parts, int64_t part_stride, int64_t begin, int64_t end, float* y) {
  for (int64_t d = begin; d < end; d += kStripe) {
    float stripe[kStripe], columns[kStripe];
    std::memcpy(stripe, acc + d, sizeof(stripe));
    for (int64_t i = 1; i < parts; ++i)
      for (int64_t u = 0; u < kStripe; u += kLanes) store(stripe + u, load(stripe + u) + load(acc + i * part_stride + d + u));
    FALCON_UNROLL
    for (int64_t u = 0; u < kStripe; ++u) columns[u] = stripe[kPlace(u)];
    std::memcpy(y + d, columns, (end - d < kStripe ? end - d : kStripe) * sizeof(float));
  }
}

#if defined(FALCON_VNNI)
// Four rows turned so that a 32-bit lane holds one column of all four: lane 4 l + t of out[j] is column 16 l + 4 j + t.
FALCON_INLINE void four_rows(const int8_t* const* at, __m512i* out) {
  const __m512i offset = _mm512_set1_epi8(-128);
  __m512i w[4];
  FALCON_UNROLL
  for (int r = 0; r < 4; ++r) w[r] = _mm512_xor_si512(_mm512_loadu_si512(at[r]), offset);
  const __m512i a = _mm512_unpacklo_epi8(w[0], w[1]), b = _mm512_unpackhi_epi8(w[0], w[1]);
  const __m512i c = _mm512_unpacklo_epi8(w[2], w[3]), d = _mm512_unpackhi_epi8(w[2], w[3]);
  out[0] = _mm512_unpacklo_epi16(a, c), out[1] = _mm512_unpackhi_epi16(a, c);
  out[2] = _mm512_unpacklo_epi16(b, d), out[3] = _mm512_unpackhi_epi16(b, d);
}

FALCON_INLINE int64_t turned_place(int64_t d) { return d / 4 % 4 * 16 + d / 16 * 4 + d % 4; }

// As `sum`, four int8 products a lane and instruction. The weights (h times scale) are rounded to 16 bits, split in two int8
// planes; see I8Dot. A tile's sum is exact, 128 times its weights taken off at the start; tiles are added up in f32.
void sum_i8(const Matrix& w, const float* h, int64_t h_stride, int64_t batch, int64_t begin, int64_t end, float* acc,
            void* scratch) {
  constexpr int kRows = 8;
  const int64_t stride = padded(w.columns), whole = w.columns / kStripe * kStripe, rows_here = end - begin;
  const int64_t tiles = (rows_here + kRows - 1) / kRows, room = (rows_here + 15) / 16 * 16;
  float* weight = static_cast<float*>(scratch);
  float* unit = weight + room;
  int32_t* offset = reinterpret_cast<int32_t*>(unit + batch);             // [batch, plane, tiles]
  int8_t* planes = reinterpret_cast<int8_t*>(offset + 2 * batch * tiles);  // [batch, plane, room]
  std::memset(acc, 0, batch * stride * sizeof(float));
  std::memset(planes, 0, 2 * batch * room);
  for (int64_t b = 0; b < batch; ++b) {
    int32_t total[2];
    for (int64_t i = 0; i < rows_here; ++i) weight[i] = h[b * h_stride + begin + i] * w.scale[w.row(begin + i)];
    unit[b] = split_i8(weight, rows_here, planes + 2 * b * room, planes + (2 * b + 1) * room, total);
  }
  for (int64_t plane = 0; plane < 2 * batch; ++plane)
    for (int64_t t = 0; t < tiles; ++t) {
      int32_t& of_tile = offset[plane * tiles + t] = 0;
      for (int r = 0; r < kRows; ++r) of_tile -= 128 * planes[plane * room + t * kRows + r];
    }
  for (int64_t t = 0; t < tiles; ++t) {
    const int8_t *rows[kRows], *next[kRows];
    row_pointers<int8_t, kRows>(w, begin + t * kRows, end, rows, next);  // past the last row stand weights of 0
    const auto step = [&](int64_t d, const int8_t* const* at) __attribute__((always_inline)) {
      __m512i turned[kRows];
      four_rows(at, turned), four_rows(at + 4, turned + 4);
      for (int64_t b = 0; b < batch; ++b) {
        __m512i fours[4], start[2];  // high and low weights of rows 0 to 3 and 4 to 7
        for (int plane = 0; plane < 2; ++plane) {
          int32_t packed[2];
          std::memcpy(packed, planes + (2 * b + plane) * room + t * kRows, kRows);
          fours[2 * plane] = _mm512_set1_epi32(packed[0]), fours[2 * plane + 1] = _mm512_set1_epi32(packed[1]);
          start[plane] = _mm512_set1_epi32(offset[(2 * b + plane) * tiles + t]);
        }
        const __m512 value = _mm512_set1_ps(unit[b]);
        float* p = acc + b * stride + d;
        FALCON_UNROLL
        for (int j = 0; j < 4; ++j) {
          const __m512i high = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(start[0], turned[j], fours[0]), turned[4 + j], fours[1]);
          const __m512i low = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(start[1], turned[j], fours[2]), turned[4 + j], fours[3]);
          const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
          _mm512_storeu_ps(p + 16 * j, _mm512_fmadd_ps(value, sum, _mm512_loadu_ps(p + 16 * j)));
        }
      }
    };
    each_stripe<int8_t, kRows>(rows, next, w.columns, step);
    if (whole < w.columns) step(whole, LastStripe<int8_t, kRows>(rows, whole, w.columns).at);
  }
}
#endif

// ---- attention

// One KV head: out_g = sum_s softmax_s(softmax_scale * <q_g, k_s> + bias_g,s) v_s over s < length, for `heads` query heads.
// Rows of k and v lie `stride` apart. scratch: heads * padded(length) + (kBlock + kLanes) * padded(width) floats.
constexpr int64_t kBlock = 64;  // positions turned round at a time, so that a lane is a position

// `width` numbers of a row in f32, in their order.
template <class Row>
FALCON_INLINE void widen(const typename Row::T* row, int64_t width, float* out) {
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t d = 0; d < whole; d += kLanes) store(out + d, Row::load1(row + d));
  if (whole == width) return;
  typename Row::T columns[kLanes] = {};
  std::memcpy(columns, row + whole, (width - whole) * sizeof(*row));
  float wide[kLanes];
  store(wide, Row::load1(columns));
  std::memcpy(out + whole, wide, (width - whole) * sizeof(float));
}

// Asks for the positions of a cache's block that starts at `begin`.
template <class T>
FALCON_INLINE void fetch_block(const T* cache, int64_t width, int64_t stride, int64_t begin, int64_t length) {
  const int64_t end = begin + kBlock < length ? begin + kBlock : length, item = sizeof(T);
  for (int64_t s = begin; s < end; ++s)
    for (int64_t byte = 0; byte < width * item; byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(cache + s * stride) + byte);
}

// a and b side by side, in the given order.
FALCON_INLINE F32 picked(F32 a, F32 b, U32 lane) {
#if defined(__clang__)
  F32 out;
  for (int l = 0; l < kLanes; ++l) out[l] = lane[l] < kLanes ? a[lane[l] % kLanes] : b[lane[l] % kLanes];
  return out;
#else
  return __builtin_shuffle(a, b, lane);
#endif
}

// Rows and columns of kLanes vectors change places: lanes that differ in one bit of their numbers, bit by bit.
template <int kBit>
FALCON_INLINE void turn(F32* v) {
  U32 low, high;
  for (int l = 0; l < kLanes; ++l) low[l] = l & kBit ? kLanes + l - kBit : l, high[l] = l & kBit ? kLanes + l : l + kBit;
  FALCON_UNROLL
  for (int i = 0; i < kLanes; ++i)
    if (!(i & kBit)) {
      const F32 a = v[i], b = v[i + kBit];
      v[i] = picked(a, b, low), v[i + kBit] = picked(a, b, high);
    }
  if constexpr (2 * kBit < kLanes) turn<2 * kBit>(v);
}

// e^x for x <= 0, to 2 units in the last place: 2^n times a polynomial of what is left; 0 below 2^-126.
FALCON_INLINE F32 exponential(F32 x) {
  const F32 magic = spread(12582912.0f);  // adding it rounds to a whole number
  x = x < spread(-87.0f) ? spread(-87.0f) : x;
  const F32 n = (x * spread(1.44269504f) + magic) - magic;
  const F32 r = (x - n * spread(0.693359375f)) - n * spread(-2.12194440e-4f);
  F32 p = spread(1.9875691e-4f);
  constexpr float rest[] = {1.3981999e-3f, 8.3334519e-3f, 4.1665796e-2f, 1.6666665e-1f, 0.5f, 1.0f, 1.0f};
  for (const float c : rest) p = p * r + spread(c);
  const U32 exponent = __builtin_convertvector(n + spread(127.0f), U32) << 23;
  return p * (F32)exponent;
}

template <class Row>
void attend(const float* q, int64_t heads, int64_t width, const void* k_, const void* v_, int64_t stride, int64_t length,
            const float* bias, int64_t bias_stride, float softmax_scale, float* out, float* scratch) {
  using T = typename Row::T;
  const T* k = static_cast<const T*>(k_);
  const T* v = static_cast<const T*>(v_);
  const int64_t room = padded(length), wide = width / kLanes * kLanes;
  const int64_t columns = padded(width);
  float *score = scratch, *block = score + heads * room, *row = block + kBlock * columns;
  fetch_block(k, width, stride, 0, length);
  for (int64_t s0 = 0; s0 < length; s0 += kBlock) {
    fetch_block(k, width, stride, s0 + kBlock, length);
    for (int64_t s = 0; s < kBlock; s += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t at = s0 + s + i < length ? s0 + s + i : length - 1;
        widen<Row>(k + at * stride, width, row + i * columns);
      }
      for (int64_t c = 0; c < width; c += kLanes) {
        F32 v[kLanes];
        FALCON_UNROLL
        for (int i = 0; i < kLanes; ++i) v[i] = load(row + i * columns + c);
        turn<1>(v);
        FALCON_UNROLL
        for (int i = 0; i < kLanes; ++i) store(block + (c + i) * kBlock + s, v[i]);
      }
    }
    for (int64_t g = 0; g < heads; ++g) {
      F32 acc[kBlock / kLanes] = {};
      for (int64_t c = 0; c < width; ++c) {
        const F32 qc = spread(softmax_scale * q[g * width + c]);
        FALCON_UNROLL
        for (int j = 0; j < kBlock / kLanes; ++j) acc[j] += qc * load(block + c * kBlock + j * kLanes);
      }
      for (int j = 0; j < kBlock / kLanes; ++j) store(score + g * room + s0 + j * kLanes, acc[j]);
    }
  }
  fetch_block(v, width, stride, 0, length);
  for (int64_t g = 0; g < heads; ++g) {
    float* p = score + g * room;
    if (bias)
      for (int64_t s = 0; s < length; ++s) p[s] += bias[g * bias_stride + s];
    for (int64_t s = length; s < room; ++s) p[s] = -INFINITY;
    F32 largest = load(p), sum = {};
    for (int64_t s = kLanes; s < room; s += kLanes) {
      const F32 x = load(p + s);
      largest = x > largest ? x : largest;
    }
    float most = largest[0];
    for (int i = 1; i < kLanes; ++i) most = largest[i] > most ? largest[i] : most;
    for (int64_t s = 0; s < room; s += kLanes) store(p + s, exponential(load(p + s) - spread(most)));
    for (int64_t s = length; s < room; ++s) p[s] = 0;
    for (int64_t s = 0; s < room; s += kLanes) sum += load(p + s);
    const F32 share = spread(1.0f / total(sum));
    for (int64_t s = 0; s < room; s += kLanes) store(p + s, share * load(p + s));
  }
  std::memset(out, 0, heads * width * sizeof(float));
  for (int64_t s0 = 0; s0 < length; s0 += kBlock) {
    const int64_t n = length - s0 < kBlock ? length - s0 : kBlock;
    fetch_block(v, width, stride, s0 + kBlock, length);
    for (int64_t s = 0; s < n; ++s) widen<Row>(v + (s0 + s) * stride, width, block + s * width);
    for (int64_t g = 0; g < heads; ++g) {
      const float* p = score + g * room + s0;
      float* o = out + g * width;
      int64_t c = 0;
      for (; c + 4 * kLanes <= wide; c += 4 * kLanes) {  // four sums at once hide each other's latency
        F32 acc[4];
        for (int j = 0; j < 4; ++j) acc[j] = load(o + c + j * kLanes);
        for (int64_t s = 0; s < n; ++s)
          for (int j = 0; j < 4; ++j) acc[j] += spread(p[s]) * load(block + s * width + c + j * kLanes);
        for (int j = 0; j < 4; ++j) store(o + c + j * kLanes, acc[j]);
      }
      for (; c < wide; c += kLanes) {
        F32 acc = load(o + c);
        for (int64_t s = 0; s < n; ++s) acc += spread(p[s]) * load(block + s * width + c);
        store(o + c, acc);
      }
      for (; c < width; ++c)
        for (int64_t s = 0; s < n; ++s) o[c] += p[s] * block[s * width + c];
    }
  }
}

// ---- reading alone, to measure memory

template <int kRows>
FALCON_INLINE U32 read_rows(const Matrix& w, int64_t row_bytes, int64_t i, int64_t end) {
  const Matrix bytes{w.data, nullptr, w.index, w.count, row_bytes};
  const uint8_t *rows[kRows], *next[kRows];
  row_pointers<uint8_t, kRows>(bytes, i, end, rows, next);
  U32 acc[kRows] = {};
  each_stripe<uint8_t, kRows>(rows, next, row_bytes, [&](int64_t, const uint8_t* const* at) __attribute__((always_inline)) {
    FALCON_UNROLL
    for (int r = 0; r < kRows; ++r)
      for (int64_t d = 0; d < kStripe; d += kBytes) acc[r] ^= *reinterpret_cast<const LooseU32*>(at[r] + d);
  });
  for (int r = 1; r < kRows; ++r) acc[0] ^= acc[r];
  return acc[0];
}

int64_t read(const Matrix& w, int64_t row_bytes, int64_t begin, int64_t end) {
  U32 acc = {};
  int64_t i = begin;
  for (; w.index && i + kTile <= end; i += kTile) acc ^= read_rows<kTile>(w, row_bytes, i, end);
  for (; i < end; ++i) acc ^= read_rows<1>(w, row_bytes, i, end);
  int64_t out = 0;
  for (int lane = 0; lane < kLanes; ++lane) out ^= acc[lane];
  return out;
}

#if defined(FALCON_BF16)
using UsedBF16Dot = BF16Dot;
#else
using UsedBF16Dot = WideDot<BF16Row>;
#endif
#if defined(FALCON_VNNI)
using UsedI8Dot = I8Dot;
constexpr auto used_i8_sum = sum_i8;
constexpr auto used_i8_unpack = unpack<turned_place>;
#else
using UsedI8Dot = WideDot<I8Row>;
constexpr auto used_i8_sum = sum<I8Row>;
constexpr auto used_i8_unpack = unpack<place<I8Row>>;
#endif

}  // namespace
}  // namespace FALCON_ISA
}  // namespace falcon

#define FALCON_KERNELS(NAME, TEXT, SUPPORTED)                                                       \
  namespace falcon {                                                                                \
  const Kernels NAME = {                                                                            \
      TEXT,                                                                                         \
      [] { return static_cast<bool>(SUPPORTED); },                                                  \
      FALCON_ISA::packed_bytes,                                                                     \
      FALCON_ISA::pack_x,                                                                           \
      {FALCON_ISA::dot<FALCON_ISA::WideDot<FALCON_ISA::F32Row>>, FALCON_ISA::dot<FALCON_ISA::UsedBF16Dot>, \
       FALCON_ISA::dot<FALCON_ISA::WideDot<FALCON_ISA::F16Row>>, FALCON_ISA::dot<FALCON_ISA::UsedI8Dot>},  \
      FALCON_ISA::sum_bytes,                                                                        \
      {FALCON_ISA::sum<FALCON_ISA::F32Row>, FALCON_ISA::sum<FALCON_ISA::BF16Row>,                   \
       FALCON_ISA::sum<FALCON_ISA::F16Row>, FALCON_ISA::used_i8_sum},                               \
      {FALCON_ISA::unpack<FALCON_ISA::place<FALCON_ISA::F32Row>>, FALCON_ISA::unpack<FALCON_ISA::place<FALCON_ISA::BF16Row>>, \
       FALCON_ISA::unpack<FALCON_ISA::place<FALCON_ISA::F16Row>>, FALCON_ISA::used_i8_unpack},      \
      {FALCON_ISA::attend<FALCON_ISA::F32Row>, FALCON_ISA::attend<FALCON_ISA::BF16Row>, FALCON_ISA::attend<FALCON_ISA::F16Row>}, \
      FALCON_ISA::read,                                                                             \
  };                                                                                                \
  }
