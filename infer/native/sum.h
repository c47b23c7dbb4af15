// Weighted sums of rows. Included by isa.h.
namespace falcon {
namespace FALCON_ISA {
namespace {

#if defined(FALCON_VNNI)
// Scratch bytes of sum_i8: sums in f32, weights in f32 and in int8 planes, and for each vector a tile's weights and a unit.
int64_t sum_bytes(int64_t columns, int64_t rows, int64_t batch) {
  return batch * (4 * padded(columns) + 2 * (rows + 24) + 128) + 4 * (rows + 24) + 64;
}
#else
int64_t sum_bytes(int64_t, int64_t, int64_t batch) { return batch * kTile * sizeof(float); }
#endif

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
  float* weight = static_cast<float*>(scratch);  // [batch, kRows]: h times the row's scale
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

// Adds up `parts` sums and writes columns [begin, end). kPlace(d): the position of column d of a stripe in a sum.
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
// Transposes a 4 x 64 matrix of int8 and adds 128, so that a 32-bit lane has a column of all four rows: lane 4 l + t of out[j] is
// column 16 l + 4 j + t.
FALCON_INLINE void transpose_four(const int8_t* const* at, __m512i* out) {
  const __m512i offset = _mm512_set1_epi8(-128);
  __m512i w[4];
  FALCON_UNROLL
  for (int r = 0; r < 4; ++r) w[r] = _mm512_xor_si512(_mm512_loadu_si512(at[r]), offset);
  const __m512i a = _mm512_unpacklo_epi8(w[0], w[1]), b = _mm512_unpackhi_epi8(w[0], w[1]);
  const __m512i c = _mm512_unpacklo_epi8(w[2], w[3]), d = _mm512_unpackhi_epi8(w[2], w[3]);
  out[0] = _mm512_unpacklo_epi16(a, c), out[1] = _mm512_unpackhi_epi16(a, c);
  out[2] = _mm512_unpacklo_epi16(b, d), out[3] = _mm512_unpackhi_epi16(b, d);
}

// The position of column d of a stripe in sums of rows transposed by transpose_four.
FALCON_INLINE int64_t transposed_place(int64_t d) { return d / 4 % 4 * 16 + d / 16 * 4 + d % 4; }

constexpr int64_t kI8Rows = 512;  // rows that can be added up in int32: 512 * 128 * 32767 < 2^31

// One vector's weights for a tile of 8 rows: two int8 planes, and -128 times the sum of each plane.
struct TileWeights {
  int32_t high[2], low[2];  // four rows each
  int32_t high_start, low_start;

  // The weights of the rows in the mask `rows`, one byte a row.
  void set(const int8_t* high_plane, const int8_t* low_plane, uint64_t rows) {
    high_start = part(high_plane, rows, high), low_start = part(low_plane, rows, low);
  }

  static int32_t part(const int8_t* plane, uint64_t rows, int32_t* out) {
    uint64_t bytes;
    std::memcpy(&bytes, plane, sizeof(bytes));
    bytes &= rows;
    std::memcpy(out, &bytes, sizeof(bytes));
    int32_t sum = 0;
    for (int r = 0; r < 8; ++r) sum += static_cast<int8_t>(bytes >> 8 * r);
    return -128 * sum;
  }

  // The weighted sum of a tile's rows for one vector of columns, exact.
  FALCON_INLINE __m512i sum(__m512i rows0to3, __m512i rows4to7) const {
    const auto plane = [&](int32_t start, const int32_t* weights) __attribute__((always_inline)) {
      const __m512i first = _mm512_dpbusd_epi32(_mm512_set1_epi32(start), rows0to3, _mm512_set1_epi32(weights[0]));
      return _mm512_dpbusd_epi32(first, rows4to7, _mm512_set1_epi32(weights[1]));
    };
    return _mm512_add_epi32(_mm512_slli_epi32(plane(high_start, high), 8), plane(low_start, low));
  }
};

// Does the sum of one vector in f32, with the columns in the order of sum_i8.
void sum_i8_wide(const Matrix& w, const float* h, int64_t begin, int64_t end, float* acc, void* scratch) {
  sum<I8Row>(w, h, 0, 1, begin, end, acc, scratch);
  for (int64_t d = 0; d < padded(w.columns); d += kStripe) {
    float stripe[kStripe];
    std::memcpy(stripe, acc + d, sizeof(stripe));
    for (int64_t u = 0; u < kStripe; ++u) acc[d + transposed_place(u)] = stripe[u];
  }
}

// As `sum`, with four int8 products in each lane of an instruction. The weights (h times scale) of a call are rounded to 16 bits and
// split into two int8 planes, see I8Dot. Sums are kept in int32, in the memory of `acc`, and added to `moved`, in f32, after every
// kI8Rows rows whose rounded weight is not 0; so rows of weight 0 do not change the result.
void sum_i8(const Matrix& w, const float* h, int64_t h_stride, int64_t batch, int64_t begin, int64_t end, float* acc,
            void* scratch) {
  constexpr int kRows = 8;
  struct Vector {
    TileWeights now, after;  // after: weights of the rows after the kI8Rows-th, if that is in this tile
    int32_t used;            // rows in the sums
    bool full, any_moved;
  };
  const int64_t stride = padded(w.columns), whole = w.columns / kStripe * kStripe, rows_here = end - begin;
  const int64_t room = (rows_here + 15) / 16 * 16;
  int32_t* sums = reinterpret_cast<int32_t*>(acc);              // [batch, stride]
  float* moved = static_cast<float*>(scratch);                  // [batch, stride]
  float* weight = moved + batch * stride;                       // [room]
  float* unit = weight + room;                                  // [batch]
  Vector* vectors = reinterpret_cast<Vector*>(unit + batch);    // [batch]
  int8_t* planes = reinterpret_cast<int8_t*>(vectors + batch);  // [batch, plane, room]
  std::memset(sums, 0, batch * stride * sizeof(int32_t));
  std::memset(vectors, 0, batch * sizeof(Vector));
  std::memset(planes, 0, 2 * batch * room);
  for (int64_t b = 0; b < batch; ++b) {
    int32_t total[2];
    for (int64_t i = 0; i < rows_here; ++i) weight[i] = h[b * h_stride + begin + i] * w.scale[w.row(begin + i)];
    unit[b] = split_i8(weight, rows_here, planes + 2 * b * room, planes + (2 * b + 1) * room, total);
  }
  for (int64_t t = 0; t < rows_here; t += kRows) {
    for (int64_t b = 0; b < batch; ++b) {
      const int8_t *high = planes + 2 * b * room + t, *low = high + room;
      Vector& v = vectors[b];
      uint64_t now = 0;  // rows up to the kI8Rows-th, as a mask of bytes
      for (int r = 0; r < kRows && v.used < kI8Rows; ++r) now |= 0xffull << 8 * r, v.used += (high[r] | low[r]) != 0;
      v.full = v.used == kI8Rows;
      v.now.set(high, low, now);
      if (!v.full) continue;
      v.after.set(high, low, ~now);
      v.used = 0;
      for (int r = 0; r < kRows; ++r) v.used += !(now >> 8 * r & 1) && (high[r] | low[r]) != 0;
      if (!v.any_moved) std::memset(moved + b * stride, 0, stride * sizeof(float));
      v.any_moved = true;
    }
    const int8_t *rows[kRows], *next[kRows];
    row_pointers<int8_t, kRows>(w, begin + t, end, rows, next);  // past `end` with weights of 0
    const auto step = [&](int64_t d, const int8_t* const* at) __attribute__((always_inline)) {
      __m512i columns[kRows];
      transpose_four(at, columns), transpose_four(at + 4, columns + 4);
      for (int64_t b = 0; b < batch; ++b) {
        const Vector& v = vectors[b];
        int32_t* p = sums + b * stride + d;
        float* out = moved + b * stride + d;
        FALCON_UNROLL
        for (int j = 0; j < 4; ++j) {
          const __m512i sum = _mm512_add_epi32(_mm512_loadu_si512(p + 16 * j), v.now.sum(columns[j], columns[4 + j]));
          if (__builtin_expect(!v.full, 1)) {
            _mm512_storeu_si512(p + 16 * j, sum);
          } else {
            const __m512 more = _mm512_mul_ps(_mm512_set1_ps(unit[b]), _mm512_cvtepi32_ps(sum));
            _mm512_storeu_ps(out + 16 * j, _mm512_add_ps(_mm512_loadu_ps(out + 16 * j), more));
            _mm512_storeu_si512(p + 16 * j, v.after.sum(columns[j], columns[4 + j]));
          }
        }
      }
    };
    each_stripe<int8_t, kRows>(rows, next, w.columns, step);
    if (whole < w.columns) step(whole, LastStripe<int8_t, kRows>(rows, whole, w.columns).at);
  }
  for (int64_t b = 0; b < batch; ++b) {
    float* out = acc + b * stride;
    if (std::isnan(unit[b])) {  // a weight is NaN or infinite
      sum_i8_wide(w, h + b * h_stride, begin, end, out, weight);
      continue;
    }
    for (int64_t d = 0; d < stride; d += 16) {
      const __m512 last = _mm512_mul_ps(_mm512_set1_ps(unit[b]), _mm512_cvtepi32_ps(_mm512_loadu_si512(sums + b * stride + d)));
      _mm512_storeu_ps(out + d, vectors[b].any_moved ? _mm512_add_ps(_mm512_loadu_ps(moved + b * stride + d), last) : last);
    }
  }
}
#endif

}  // namespace
}  // namespace FALCON_ISA
}  // namespace falcon
