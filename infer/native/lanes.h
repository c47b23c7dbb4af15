// What all kernels of an instruction set use: vectors of kBytes bytes, row formats, and loops over rows with prefetching. Included
// by isa.h.
namespace falcon {
namespace FALCON_ISA {
namespace {

#define FALCON_INLINE inline __attribute__((always_inline))

constexpr int64_t kBytes = FALCON_VECTOR_BYTES;
constexpr int kLanes = kBytes / 4;
constexpr int64_t kAhead = 4096;  // bytes from the columns being multiplied to those being prefetched
#if defined(FALCON_AVX512)
constexpr int kTile = 8;  // rows multiplied together: memory delivers several streams faster, and a loaded input is used for all
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

// out[l] = element lane[l] of a and b, concatenated.
FALCON_INLINE F32 shuffle(F32 a, F32 b, U32 lane) {
#if defined(__clang__)
  F32 out;
  for (int l = 0; l < kLanes; ++l) out[l] = lane[l] < kLanes ? a[lane[l] % kLanes] : b[lane[l] % kLanes];
  return out;
#else
  return __builtin_shuffle(a, b, lane);
#endif
}

// Transposes the kLanes x kLanes matrix in v. Step kBit exchanges lane l + kBit of vector i with lane l of vector i + kBit, for all
// i and l without that bit.
template <int kBit = 1>
FALCON_INLINE void transpose(F32* v) {
  U32 low, high;
  for (int l = 0; l < kLanes; ++l) low[l] = l & kBit ? kLanes + l - kBit : l, high[l] = l & kBit ? kLanes + l : l + kBit;
  FALCON_UNROLL
  for (int i = 0; i < kLanes; ++i)
    if (!(i & kBit)) {
      const F32 a = v[i], b = v[i + kBit];
      v[i] = shuffle(a, b, low), v[i + kBit] = shuffle(a, b, high);
    }
  if constexpr (2 * kBit < kLanes) transpose<2 * kBit>(v);
}

// A row format: its number type T, load1 of kLanes numbers in order, and load2 of 2 * kLanes numbers in the order that is fastest.
// With kPairs, load2 returns the even and the odd columns (a bf16 is the upper half of an f32, so that a shift and a mask convert a
// pair), else the first and the second half.
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
    // Moves the exponent to its place in an f32 and changes its bias. A subnormal f16 has no implicit leading one: one is added and
    // then subtracted. No intermediate result may be a subnormal f32, since XLA's threads flush these to 0.
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

// The position of column `d` of a stripe in a packed vector of the format: load2's order.
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
    __builtin_prefetch(reinterpret_cast<const char*>(p) + 64 * line, 0, 1);  // into L2, as L1 is full of inputs
}

// Calls body(d) for d, d + kStripe, ... < end; returns the d after the last call. Unrolled: a stripe of int8 is only one vector, and
// every third instruction would otherwise compute row pointers.
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

// Calls step(first column, pointers to it in each row) for every whole stripe of kRows rows. kFetch: prefetches the data kAhead bytes
// later, in the same rows, and near their ends in the `next` rows.
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

// Positions from a tile to the one that it prefetches: one tile, or as many short rows as fit into 2 * kAhead bytes.
template <class T, int kRows>
FALCON_INLINE int64_t tile_ahead(int64_t columns) {
  const int64_t tiles = 2 * kAhead / (columns * static_cast<int64_t>(sizeof(T)) * kRows);
  return kRows * (tiles > 1 ? tiles : 1);
}

// Pointers to the rows of the tile at `first` and of the tile to prefetch, which this thread most likely multiplies later. Past
// `end` they point to some valid row.
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

}  // namespace
}  // namespace FALCON_ISA
}  // namespace falcon
