// Reading rows without computing, to measure the memory bandwidth. Included by isa.h.
namespace falcon {
namespace FALCON_ISA {
namespace {

template <int kRows>
FALCON_INLINE U32 read_rows(const Matrix& w, int64_t row_bytes, int64_t i, int64_t end) {
  const Matrix bytes{w.data, nullptr, w.index, w.count, row_bytes, row_bytes, 0};
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

}  // namespace
}  // namespace FALCON_ISA
}  // namespace falcon
