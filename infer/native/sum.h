// Weighted sums of rows. Included by isa.h.
namespace falcon {
namespace FALCON_ISA {
namespace {

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

}  // namespace
}  // namespace FALCON_ISA
}  // namespace falcon
