// Products of blocks in tiles of 16 rows of 64 bytes, as AMX has them; and a stand-in of AMX's instructions in ordinary loops, so that
// everything around them can be tested on any machine. Included after products.h.
namespace falcon {
namespace FALCON_ISA {
namespace {

#if defined(FALCON_AMX)
struct Tiles {
  // The calling thread's tiles while this exists: eight of 16 rows of 64 bytes.
  struct Scope {
    Scope() {
      struct {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
      } shape;
      static_assert(sizeof(shape) == 64, "the layout that ldtilecfg reads");
      for (int t = 0; t < 8; ++t) shape.bytes[t] = 64, shape.rows[t] = 16;
      _tile_loadconfig(&shape);
    }
    ~Scope() { _tile_release(); }
  };

  // In assembly, as GCC's intrinsics take the number of a tile only as written digits.
  template <int kTile>
  FALCON_INLINE void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(kTile)); }
  template <int kTile>
  FALCON_INLINE void read(const void* from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(stride) : "memory");
  }
  template <int kTile>
  FALCON_INLINE void write(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(to), "r"(stride) : "memory");
  }
  template <bool kInt8, int kSum, int kA, int kB>
  FALCON_INLINE void multiply() {
    if constexpr (kInt8) asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
    else asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
  }
};
#else
struct Tiles {
  struct Scope {};

  union Tile {
    float f32[16][16];
    int32_t i32[16][16];
    uint16_t bf16[16][32];
    int8_t i8[16][64];
    uint8_t bytes[16][64];
  } tiles[8];

  template <int kTile>
  void zero() { std::memset(&tiles[kTile], 0, sizeof(Tile)); }
  template <int kTile>
  void read(const void* from, int64_t stride) {
    for (int r = 0; r < 16; ++r) std::memcpy(tiles[kTile].bytes[r], static_cast<const uint8_t*>(from) + r * stride, 64);
  }
  template <int kTile>
  void write(void* to, int64_t stride) {
    for (int r = 0; r < 16; ++r) std::memcpy(static_cast<uint8_t*>(to) + r * stride, tiles[kTile].bytes[r], 64);
  }
  template <bool kInt8, int kSum, int kA, int kB>
  void multiply() {
    Tile &sum = tiles[kSum], &a = tiles[kA], &b = tiles[kB];
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 16; ++n) {
          if constexpr (kInt8) {
            for (int i = 0; i < 4; ++i) sum.i32[m][n] += a.i8[m][4 * k + i] * b.i8[k][4 * n + i];
          } else {
            for (int i = 0; i < 2; ++i) sum.f32[m][n] += f32(a.bf16[m][2 * k + i]) * f32(b.bf16[k][2 * n + i]);
          }
        }
  }
  static float f32(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float out;
    std::memcpy(&out, &wide, sizeof(out));
    return out;
  }
};
#endif

// acc[r * stride + c] += row_scale[r] * column_scale[c] * sums[r][c] for 16 x 16 sums, each rounded once after a product of the scales:
// the same bits as in registers.h.
inline void add_scaled(const int32_t (*sums)[16], const float* row_scale, const float* column_scale, float* acc, int64_t stride) {
  for (int r = 0; r < 16; ++r) {
#if defined(FALCON_AVX512)
    __m512 scale = _mm512_loadu_ps(column_scale);
    if (row_scale) scale = _mm512_mul_ps(scale, _mm512_set1_ps(row_scale[r]));
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums[r]));
    _mm512_storeu_ps(acc + r * stride, _mm512_fmadd_ps(sum, scale, _mm512_loadu_ps(acc + r * stride)));
#else
    for (int c = 0; c < 16; ++c) {
      const float scale = row_scale ? column_scale[c] * row_scale[r] : column_scale[c];
      acc[r * stride + c] = __builtin_fmaf(static_cast<float>(sums[r][c]), scale, acc[r * stride + c]);
    }
#endif
  }
}

struct TileProduct {
  using Scope = Tiles::Scope;
  static constexpr int64_t kRowUnit = 16, kBlockRows = 32;
  static constexpr bool kUnsigned = false, kBF16 = true;

  // Number of calls of Ahead::turn for a block; each follows `words` / 16 calls of Ahead::step.
  static int64_t turns(int64_t rows, int64_t width) { return (rows + 31) / 32 * ((width + 31) / 32); }

  // kA x kB tiles of results, from row r and column c on.
  template <bool kInt8, int kA, int kB>
  static FALCON_INLINE void multiply_tiles(Tiles& tiles, const Blocks& o, int64_t r, int64_t c, Ahead& ahead) {
    float* acc = o.acc + r * o.stride + c;
    const int64_t stride = o.stride * sizeof(float);
    if constexpr (kInt8) {
      tiles.template zero<0>(), tiles.template zero<1>(), tiles.template zero<2>(), tiles.template zero<3>();
    } else {
      tiles.template read<0>(acc, stride);
      if constexpr (kB == 2) tiles.template read<1>(acc + 16, stride);
      if constexpr (kA == 2) tiles.template read<2>(acc + 16 * o.stride, stride);
      if constexpr (kA == 2 && kB == 2) tiles.template read<3>(acc + 16 * o.stride + 16, stride);
    }
    const uint8_t* a = o.a + r * o.a_stride;
    const uint32_t* b = o.b + c * o.words;
    for (int64_t k = 0; k < o.words; k += 16, a += 64, b += 256) {
      tiles.template read<4>(a, o.a_stride);
      tiles.template read<6>(b, 64);
      tiles.template multiply<kInt8, 0, 4, 6>();
      if constexpr (kB == 2) tiles.template read<7>(b + 16 * o.words, 64), tiles.template multiply<kInt8, 1, 4, 7>();
      if constexpr (kA == 2) tiles.template read<5>(a + 16 * o.a_stride, o.a_stride), tiles.template multiply<kInt8, 2, 5, 6>();
      if constexpr (kA == 2 && kB == 2) tiles.template multiply<kInt8, 3, 5, 7>();
      ahead.step();
    }
    if constexpr (kInt8) {
      alignas(64) int32_t sums[4][16][16];
      const auto add = [&](int tile, int64_t down, int64_t right) __attribute__((always_inline)) {
        add_scaled(sums[tile], o.row_scale ? o.row_scale + r + down : nullptr, o.column_scale + c + right,
                   acc + down * o.stride + right, o.stride);
      };
      tiles.template write<0>(sums[0], 64);
      if constexpr (kB == 2) tiles.template write<1>(sums[1], 64);
      if constexpr (kA == 2) tiles.template write<2>(sums[2], 64);
      if constexpr (kA == 2 && kB == 2) tiles.template write<3>(sums[3], 64);
      add(0, 0, 0);
      if constexpr (kB == 2) add(1, 0, 16);
      if constexpr (kA == 2) add(2, 16, 0);
      if constexpr (kA == 2 && kB == 2) add(3, 16, 16);
    } else {
      tiles.template write<0>(acc, stride);
      if constexpr (kB == 2) tiles.template write<1>(acc + 16, stride);
      if constexpr (kA == 2) tiles.template write<2>(acc + 16 * o.stride, stride);
      if constexpr (kA == 2 && kB == 2) tiles.template write<3>(acc + 16 * o.stride + 16, stride);
    }
  }

  template <bool kInt8>
  static void multiply(const Blocks& o, Ahead& ahead) {
    Tiles tiles;
    for (int64_t r = 0; r < o.rows; r += 32)
      for (int64_t c = 0; c < o.width; c += 32) {
        const bool two_rows = r + 16 < o.rows, two_columns = c + 16 < o.width;
        if (two_rows && two_columns) multiply_tiles<kInt8, 2, 2>(tiles, o, r, c, ahead);
        else if (two_rows) multiply_tiles<kInt8, 2, 1>(tiles, o, r, c, ahead);
        else if (two_columns) multiply_tiles<kInt8, 1, 2>(tiles, o, r, c, ahead);
        else multiply_tiles<kInt8, 1, 1>(tiles, o, r, c, ahead);
        ahead.turn();
      }
  }
};

}  // namespace

const Products kProducts = products_of<TileProduct>();

}  // namespace FALCON_ISA
}  // namespace falcon
