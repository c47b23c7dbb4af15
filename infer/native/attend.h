// Attention over the KV cache. Included by isa.h.
namespace falcon {
namespace FALCON_ISA {
namespace {

constexpr int64_t kBlock = 64;  // positions whose keys are transposed together, so that a lane is a position

// Converts the first `width` numbers of a row to f32.
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

// e^x for x <= 0, within 2 units in the last place: x = n log(2) + r, and the result is 2^n times a polynomial of r. Below -87 it is
// e^-87 = 1.6e-38, just above the subnormal numbers.
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

int64_t attend_bytes(int64_t queries, int64_t width, int64_t positions) {
  return (queries * padded(positions) + (kBlock + kLanes) * padded(width)) * sizeof(float);
}

// Scores of the positions from `first` on with every query: score[r * room + s] = softmax_scale * <q_r, k_(first + s)>.
template <class Row>
void scores(const Attention& a, int64_t room, float* score, float* block, float* row) {
  const auto* k = static_cast<const typename Row::T*>(a.k);
  const int64_t columns = padded(a.width);
  for (int64_t s0 = a.begin; s0 < a.end; s0 += kBlock) {
    float scale[kBlock];
    for (int64_t s = 0; s < kBlock; s += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t at = s0 + s + i < a.end ? s0 + s + i : a.end - 1;
        widen<Row>(k + at * a.stride, a.width, row + i * columns);
        scale[s + i] = a.softmax_scale * (a.k_scale ? a.k_scale[at * a.scale_stride] : 1.0f);
      }
      for (int64_t c = 0; c < a.width; c += kLanes) {
        F32 tile[kLanes];
        FALCON_UNROLL
        for (int i = 0; i < kLanes; ++i) tile[i] = load(row + i * columns + c);
        transpose(tile);
        FALCON_UNROLL
        for (int i = 0; i < kLanes; ++i) store(block + (c + i) * kBlock + s, tile[i]);
      }
    }
    for (int64_t r = 0; r < a.queries; ++r) {
      F32 acc[kBlock / kLanes] = {};
      for (int64_t c = 0; c < a.width; ++c) {
        const F32 qc = spread(a.q[r * a.width + c]);
        FALCON_UNROLL
        for (int j = 0; j < kBlock / kLanes; ++j) acc[j] += qc * load(block + c * kBlock + j * kLanes);
      }
      for (int j = 0; j < kBlock / kLanes; ++j)
        store(score + r * room + s0 - a.begin + j * kLanes, load(scale + j * kLanes) * acc[j]);
    }
  }
}

// Attention of a few queries over positions [begin, end) of one KV head's cache, as a part of a sum over more: with score_s =
// softmax_scale * <q_r, k_s> + bias_r,s over the positions s < length_r of that range, most_r is the highest score, sum_r the sum of
// e^(score_s - most_r), and out_r that of e^(score_s - most_r) v_s. A query without a position there has most_r = -infinity.
// What comes out for a query does not depend on the others. scratch: attend_bytes() bytes.
template <class Row>
void attend(const Attention& a, float* scratch) {
  const auto* v = static_cast<const typename Row::T*>(a.v);
  const int64_t room = padded(a.end - a.begin), wide = a.width / kLanes * kLanes;
  float *score = scratch, *block = score + a.queries * room, *row = block + kBlock * padded(a.width);
  scores<Row>(a, room, score, block, row);
  for (int64_t r = 0; r < a.queries; ++r) {
    float* p = score + r * room;
    const int64_t n = (a.length[r] < a.end ? a.length[r] : a.end) - a.begin;
    a.most[r] = -INFINITY;
    a.sum[r] = 0;
    if (n <= 0) continue;
    if (a.bias)
      for (int64_t s = 0; s < n; ++s) p[s] += a.bias[r][a.begin + s];
    const int64_t used = padded(n);
    for (int64_t s = n; s < used; ++s) p[s] = -INFINITY;
    F32 largest = load(p), sum = {};
    for (int64_t s = kLanes; s < used; s += kLanes) {
      const F32 x = load(p + s);
      largest = x > largest ? x : largest;
    }
    float most = largest[0];
    for (int i = 1; i < kLanes; ++i) most = largest[i] > most ? largest[i] : most;
    for (int64_t s = 0; s < used; s += kLanes) store(p + s, exponential(load(p + s) - spread(most)));
    for (int64_t s = n; s < used; ++s) p[s] = 0;
    for (int64_t s = 0; s < used; s += kLanes) sum += load(p + s);
    a.most[r] = most;
    a.sum[r] = total(sum);
    if (a.v_scale)
      for (int64_t s = 0; s < n; ++s) p[s] *= a.v_scale[(a.begin + s) * a.scale_stride];
  }
  std::memset(a.out, 0, a.queries * a.width * sizeof(float));
  for (int64_t s0 = a.begin; s0 < a.end; s0 += kBlock) {
    const int64_t some = a.end - s0 < kBlock ? a.end - s0 : kBlock;
    for (int64_t s = 0; s < some; ++s) widen<Row>(v + (s0 + s) * a.stride, a.width, block + s * a.width);
    for (int64_t r = 0; r < a.queries; ++r) {
      const int64_t n = a.length[r] - s0 < some ? a.length[r] - s0 : some;
      const float* p = score + r * room + s0 - a.begin;
      float* o = a.out + r * a.width;
      int64_t c = 0;
      for (; c + 4 * kLanes <= wide; c += 4 * kLanes) {  // four sums at once hide each other's latency
        F32 acc[4];
        for (int j = 0; j < 4; ++j) acc[j] = load(o + c + j * kLanes);
        for (int64_t s = 0; s < n; ++s)
          for (int j = 0; j < 4; ++j) acc[j] += spread(p[s]) * load(block + s * a.width + c + j * kLanes);
        for (int j = 0; j < 4; ++j) store(o + c + j * kLanes, acc[j]);
      }
      for (; c < wide; c += kLanes) {
        F32 acc = load(o + c);
        for (int64_t s = 0; s < n; ++s) acc += spread(p[s]) * load(block + s * a.width + c);
        store(o + c, acc);
      }
      for (; c < a.width; ++c)
        for (int64_t s = 0; s < n; ++s) o[c] += p[s] * block[s * a.width + c];
    }
  }
}

}  // namespace
}  // namespace FALCON_ISA
}  // namespace falcon
