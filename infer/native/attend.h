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

int64_t attend_bytes(int64_t heads, int64_t width, int64_t length) {
  return (heads * padded(length) + (kBlock + kLanes) * padded(width)) * sizeof(float);
}

// Attention of `heads` query heads g over one KV head: out_g = sum_s softmax_s(softmax_scale * <q_g, k_s> + bias_g,s) v_s over
// s < length. Rows of k and v are `stride` numbers apart. scratch: attend_bytes() bytes.
template <class Row>
void attend(const float* q, int64_t heads, int64_t width, const void* k_, const void* v_, int64_t stride, int64_t length,
            const float* bias, int64_t bias_stride, float softmax_scale, float* out, float* scratch) {
  using T = typename Row::T;
  const T* k = static_cast<const T*>(k_);
  const T* v = static_cast<const T*>(v_);
  const int64_t room = padded(length), columns = padded(width), wide = width / kLanes * kLanes;
  float *score = scratch, *block = score + heads * room, *row = block + kBlock * columns;
  for (int64_t s0 = 0; s0 < length; s0 += kBlock) {
    for (int64_t s = 0; s < kBlock; s += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t at = s0 + s + i < length ? s0 + s + i : length - 1;
        widen<Row>(k + at * stride, width, row + i * columns);
      }
      for (int64_t c = 0; c < width; c += kLanes) {
        F32 tile[kLanes];
        FALCON_UNROLL
        for (int i = 0; i < kLanes; ++i) tile[i] = load(row + i * columns + c);
        transpose(tile);
        FALCON_UNROLL
        for (int i = 0; i < kLanes; ++i) store(block + (c + i) * kBlock + s, tile[i]);
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
    const F32 normaliser = spread(1.0f / total(sum));
    for (int64_t s = 0; s < room; s += kLanes) store(p + s, normaliser * load(p + s));
  }
  std::memset(out, 0, heads * width * sizeof(float));
  for (int64_t s0 = 0; s0 < length; s0 += kBlock) {
    const int64_t n = length - s0 < kBlock ? length - s0 : kBlock;
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

}  // namespace
}  // namespace FALCON_ISA
}  // namespace falcon
