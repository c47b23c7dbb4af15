// Rounding rows to int4: the search for scales, and rounding with error feedback. Called by infer/weights/rounding.py, which says what is
// computed; each call runs on one thread.
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif
#if defined(__x86_64__) && defined(__gnu_linux__)
#define FALCON_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FALCON_CLONES
#endif
#define FALCON_INLINE inline __attribute__((always_inline))

namespace {

constexpr int kLanes = 16, kLevels = 16, kGroup = 32;  // as in infer/weights/int4.py
constexpr int kPanel = 32;                             // steps of the feedback between two updates of what follows
constexpr int kTile = 64;                              // columns of the feedback that are worked on together

typedef float F32 __attribute__((vector_size(kLanes * 4)));
typedef int32_t I32 __attribute__((vector_size(kLanes * 4)));
typedef uint32_t U32 __attribute__((vector_size(kLanes * 4)));
typedef F32 LooseF32 __attribute__((aligned(4), may_alias));

FALCON_INLINE F32 spread(float x) { return F32{} + x; }
FALCON_INLINE F32 load(const float* p) { return *reinterpret_cast<const LooseF32*>(p); }
FALCON_INLINE void store(float* p, F32 x) { *reinterpret_cast<LooseF32*>(p) = x; }

// Rounds to the nearest of 16 ascending levels.
struct Levels {
  float first, middle[kLevels - 1], step[kLevels - 1];

  FALCON_INLINE explicit Levels(const float* levels) : first(levels[0]) {
    for (int i = 0; i + 1 < kLevels; ++i) {
      middle[i] = (levels[i] + levels[i + 1]) / 2;
      step[i] = levels[i + 1] - levels[i];
    }
  }
  FALCON_INLINE F32 level(F32 x) const {
    F32 q = spread(first);
    for (int i = 0; i + 1 < kLevels; ++i) q += x > spread(middle[i]) ? spread(step[i]) : F32{};
    return q;
  }
  FALCON_INLINE I32 code(F32 x) const {
    I32 code = {};
    for (int i = 0; i + 1 < kLevels; ++i) code -= x > spread(middle[i]);
    return code;
  }
};

// Rounds to the nearest f16 number, ties to even; magnitudes above 65504 become 65504.
FALCON_INLINE F32 to_f16(F32 x) {
  x = x > spread(65504.0f) ? spread(65504.0f) : x;
  x = x < spread(-65504.0f) ? spread(-65504.0f) : x;
  U32 bits = (U32)x;
  bits = (bits + 0xFFFu + ((bits >> 13) & 1u)) & ~0x1FFFu;
  const F32 magnitude = x < F32{} ? -x : x, magic = spread(0.75f);  // numbers near 0.75 are 2^-24 apart, as small f16 numbers are
  const F32 small = (x + magic) - magic;
  return magnitude < spread(6.103515625e-5f) ? small : (F32)bits;
}

// The bits of an f32 number that is an f16 number.
uint16_t f16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  const int exponent = static_cast<int>(bits >> 23 & 255) - 127;
  if (exponent < -14) return sign | static_cast<uint16_t>((x < 0 ? -x : x) * 16777216.0f);
  return sign | static_cast<uint16_t>((exponent + 15) << 10 | (bits >> 13 & 0x3FF));
}

FALCON_INLINE F32 inverse(F32 x) { return x == F32{} ? F32{} : spread(1.0f) / (x == F32{} ? spread(1.0f) : x); }

// Numbers [kGroup][kLanes] of the 16 groups from `group` on of a row; zeros past its end.
FALCON_INLINE void groups_to_lanes(const float* row, int64_t columns, int64_t group, float (*out)[kLanes]) {
  for (int lane = 0; lane < kLanes; ++lane)
    for (int c = 0; c < kGroup; ++c) {
      const int64_t d = (group + lane) * kGroup + c;
      out[c][lane] = d < columns ? row[d] : 0;
    }
}

}  // namespace

// Codes [rows, columns] and f16 scales [rows, groups] of x [rows, columns]; weight: [columns].
extern "C" FALCON_CLONES void falcon_int4_search(const float* x, int64_t rows, int64_t columns, const float* weight, const float* levels,
                                                 const float* peaks, int64_t attempts, uint8_t* codes, uint16_t* scales) {
  const Levels to(levels);
  const int64_t groups = (columns + kGroup - 1) / kGroup;
  for (int64_t group = 0; group < groups; group += kLanes) {
    alignas(64) float v[kGroup][kLanes], weights[kGroup][kLanes];
    groups_to_lanes(weight, columns, group, weights);
    for (int64_t r = 0; r < rows; ++r) {
      groups_to_lanes(x + r * columns, columns, group, v);
      F32 most = {}, peak = {}, square = {};
      for (int c = 0; c < kGroup; ++c) {
        const F32 n = load(v[c]), magnitude = n < F32{} ? -n : n;
        peak = magnitude > most ? n : peak;
        most = magnitude > most ? magnitude : most;
        square += load(weights[c]) * n * n;
      }
      const F32 unit = inverse(peak);
      F32 least = spread(3e38f), best = {};
      for (int64_t i = 0; i < attempts; ++i) {
        const F32 factor = spread(peaks[i]) * unit;
        F32 along = {}, fit = {};
        for (int c = 0; c < kGroup; ++c) {
          const F32 n = load(v[c]), q = to.level(n * factor), weighted = load(weights[c]) * q;
          along += weighted * n;
          fit += weighted * q;
        }
        const F32 scale = to_f16(along * inverse(fit)), error = square - scale * (along + along - scale * fit);
        best = error < least ? scale : best;
        least = error < least ? error : least;
      }
      const F32 invert = inverse(best);
      for (int lane = 0; lane < kLanes && group + lane < groups; ++lane) scales[r * groups + group + lane] = f16_bits(best[lane]);
      for (int c = 0; c < kGroup; ++c) {
        const I32 code = to.code(load(v[c]) * invert);
        for (int lane = 0; lane < kLanes; ++lane) {
          const int64_t d = (group + lane) * kGroup + c;
          if (d < columns) codes[r * columns + d] = static_cast<uint8_t>(code[lane]);
        }
      }
    }
  }
}

// Rounds w [steps, columns] step by step with scale [steps, columns], each step's error corrected in the later ones; codes as w.
// panels: [steps / 32, steps, 32], panels[p, j, b] = U[32 p + b, j]. steps is a multiple of 32, columns of 64.
extern "C" FALCON_CLONES void falcon_int4_feedback(const float* w, const float* scale, const float* panels, int64_t steps, int64_t columns,
                                                   const float* levels, uint8_t* codes) {
  constexpr int kVectors = kTile / kLanes, kRows = 4;
  const Levels to(levels);
  std::vector<float> memory(steps * kTile);
  float* tile = memory.data();
  alignas(64) float error[kPanel][kTile];
  for (int64_t first = 0; first < columns; first += kTile) {
    for (int64_t k = 0; k < steps; ++k) std::memcpy(tile + k * kTile, w + k * columns + first, kTile * sizeof(float));
    for (int64_t k0 = 0; k0 < steps; k0 += kPanel) {
      const float* panel = panels + k0 * steps;
      for (int b = 0; b < kPanel; ++b) {
        const int64_t k = k0 + b;
        const F32 divide = spread(1.0f / panel[k * kPanel + b]);
        for (int c = 0; c < kTile; c += kLanes) {
          const F32 v = load(tile + k * kTile + c), s = load(scale + k * columns + first + c), x = v * inverse(s);
          const I32 code = to.code(x);
          for (int lane = 0; lane < kLanes; ++lane) codes[k * columns + first + c + lane] = static_cast<uint8_t>(code[lane]);
          store(error[b] + c, (v - s * to.level(x)) * divide);
        }
        for (int64_t j = k + 1; j < k0 + kPanel; ++j)
          for (int c = 0; c < kTile; c += kLanes)
            store(tile + j * kTile + c, load(tile + j * kTile + c) - spread(panel[j * kPanel + b]) * load(error[b] + c));
      }
      for (int64_t j = k0 + kPanel; j < steps; j += kRows) {
        F32 acc[kRows][kVectors];
        for (int r = 0; r < kRows; ++r)
          for (int i = 0; i < kVectors; ++i) acc[r][i] = load(tile + (j + r) * kTile + i * kLanes);
        for (int b = 0; b < kPanel; ++b)
          for (int r = 0; r < kRows; ++r) {
            const F32 u = spread(panel[(j + r) * kPanel + b]);
            for (int i = 0; i < kVectors; ++i) acc[r][i] -= u * load(error[b] + i * kLanes);
          }
        for (int r = 0; r < kRows; ++r)
          for (int i = 0; i < kVectors; ++i) store(tile + (j + r) * kTile + i * kLanes, acc[r][i]);
      }
    }
  }
}
