// Products of rows with many vectors, on one thread: blocks of rows, 16 to 64 vectors at a time, in bf16 or int8. `Inner` multiplies two
// blocks; tiles.h and registers.h have one each. Included after panels.h.
namespace falcon {
namespace FALCON_ISA {
namespace {

constexpr int64_t kMostTokens = 256;  // vectors multiplied with a block of rows while both are in the L2 cache
constexpr int64_t kMostRows = 512;    // rows whose results are kept there

// What is done for the next blocks while two blocks are multiplied: rows are prefetched, and put into order.
struct Ahead {
  const char* at = nullptr;  // of the next row to prefetch
  int64_t row_bytes = 0, lines = 0, rows = 0, extra = 0, each = 0, line = 0;
  void (*order)(void*) = nullptr;
  void* orderer = nullptr;

  // Prefetches lines [from, from + bytes) of `rows` rows from `row` on, and one line `extra` bytes after each row's first, in about `steps` steps.
  Ahead(const Matrix& w, int64_t row, int64_t rows, int64_t from, int64_t bytes, int64_t extra, int64_t steps)
      : at(static_cast<const char*>(w.data) + row * w.row_bytes + from), row_bytes(w.row_bytes), lines((bytes + 63) / 64), rows(rows), extra(extra) {
    each = (lines * rows + steps - 1) / (steps > 0 ? steps : 1);
  }

  FALCON_INLINE void step() {
    for (int64_t i = 0; i < each && rows > 0; ++i) {
      if (!line) __builtin_prefetch(at + extra, 0, 2);
      __builtin_prefetch(at + 64 * line, 0, 2);
      if (++line == lines) line = 0, at += row_bytes, --rows;
    }
  }
  FALCON_INLINE void turn() {
    if (order) order(orderer);
  }
};

// acc[r * stride + c] += row_scale[r] * column_scale[c] * (row r of `a` times column c of the panel `b`), or without the scales in
// bf16. In int8, scales and `start`, what the sum of a column begins with where rows are unsigned, are not null, except that row_scale
// may be.
struct Blocks {
  const uint8_t* a;
  int64_t a_stride, rows;  // bytes
  const uint32_t* b;       // [width / 16, words, 16]
  int64_t width, words;
  const float *row_scale, *column_scale;
  const int32_t* start;
  float* acc;
  int64_t stride;
};

// y[t * y_stride + r] = scale[r] * acc[r * stride + t] for r < rows, t < batch.
void store_transposed(const float* acc, int64_t stride, int64_t rows, int64_t batch, const float* scale, float* y, int64_t y_stride) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t t = 0; t < batch; t += kLanes) {
      F32 v[kLanes];
      FALCON_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        const int64_t row = r + i < rows ? r + i : rows - 1;
        v[i] = load(acc + row * stride + t) * spread(scale ? scale[row] : 1.0f);
      }
      transpose(v);
      for (int64_t j = 0; j < kLanes && t + j < batch; ++j) {
        float* out = y + (t + j) * y_stride + r;
        if (rows - r >= kLanes) {
          store(out, v[j]);
        } else {
          float lanes[kLanes];
          store(lanes, v[j]);
          std::memcpy(out, lanes, (rows - r) * sizeof(float));
        }
      }
    }
}

constexpr int64_t kRoomStride = 2 * kDepth + 64;  // bytes

// Copies columns [k, k + depth) of `rows` rows from row i on as they are multiplied, and rows of zeros up to the next multiple of
// Inner::kRowUnit. Rows as stored may be a power of two apart, and then evict each other's lines.
template <class Inner>
void copy_rows(const Matrix& w, int format, int64_t i, int64_t rows, int64_t k, int64_t depth, uint8_t* room, float* row_scale) {
  const int64_t item = format == kBF16 ? 2 : 1;
  for (int64_t r = 0; r < (rows + Inner::kRowUnit - 1) / Inner::kRowUnit * Inner::kRowUnit; ++r) {
    const uint8_t* row = static_cast<const uint8_t*>(w.data) + (i + r) * w.row_bytes;
    uint8_t* out = room + r * kRoomStride;
    row_scale[r] = 0;
    if (r >= rows)
      std::memset(out, 0, depth * item);
    else if (format == kI4)
      row_scale[r] = int4_as_i8(w, row, k, depth, reinterpret_cast<int8_t*>(out));
    else
      std::memcpy(out, row + k * item, depth * item);
    if (Inner::kUnsigned && format != kBF16)
      for (int64_t c = 0; c < depth; ++c) out[c] ^= 0x80;
  }
}

// y[t * y_stride + i] = <row i, vector t> for begin <= i < end. `panels`: all vectors, as pack_panel packs them, kPanel a panel.
template <class Inner>
void rows_product(const Matrix& w, int format, const void* panels, int64_t batch, int64_t begin, int64_t end, float* y, int64_t y_stride,
                  void* scratch) {
  constexpr int64_t kRows = Inner::kBlockRows;
  const bool int8 = in_int8(format, false);
  const int64_t bytes = vector_bytes(format, w.columns), per_word = int8 ? 4 : 2;
  const int64_t code_bytes = int4_blocks(w.columns) * kInt4CodeBytes;
  float* acc = static_cast<float*>(scratch);  // [rows, vectors]
  float* row_scale = acc + kMostRows * (kMostTokens + 16);
  uint8_t* room = reinterpret_cast<uint8_t*>(row_scale + 64);
  [[maybe_unused]] const typename Inner::Scope scope;
  for (int64_t t0 = 0; t0 < batch; t0 += kMostTokens) {
    const int64_t here = batch - t0 < kMostTokens ? batch - t0 : kMostTokens, tokens = whole_tiles(here), stride = tokens + 16;
    for (int64_t i0 = begin; i0 < end; i0 += kMostRows) {
      const int64_t stop = i0 + kMostRows < end ? i0 + kMostRows : end;
      std::memset(acc, 0, (stop - i0 + 15) / 16 * 16 * stride * sizeof(float));
      for (int64_t k = 0; k < w.columns; k += kDepth) {
        const int64_t depth = w.columns - k < kDepth ? w.columns - k : kDepth;
        for (int64_t i = i0; i < stop; i += kRows) {
          const int64_t rows = stop - i < kRows ? stop - i : kRows;
          // Next: the following rows; after the last ones, the first ones' next columns; after these, the following rows.
          const bool last = i + kRows >= stop, wrap = last && k + kDepth < w.columns;
          const int64_t then = wrap ? i0 : i + kRows, column = last ? (wrap ? k + kDepth : 0) : k;
          const int64_t left = w.count - then < kRows ? w.count - then : kRows;
          const int64_t from = format == kBF16 ? 2 * column : format == kI8 ? column : column / 2;
          const int64_t part = format == kBF16 ? 2 * kDepth : format == kI8 ? kDepth : kDepth / 2;
          const int64_t extra = format == kI4 ? code_bytes + column / w.group * 2 - from : 0;
          Ahead ahead(w, then, left, from, from + part < w.row_bytes ? part : w.row_bytes - from, extra, Inner::turns(rows, tokens) * depth / per_word / 16);
          copy_rows<Inner>(w, format, i, rows, k, depth, room, row_scale);
          Blocks o;
          o.a = room, o.a_stride = kRoomStride;
          o.rows = (rows + Inner::kRowUnit - 1) / Inner::kRowUnit * Inner::kRowUnit, o.words = depth / per_word;
          o.row_scale = format == kI4 ? row_scale : nullptr, o.stride = stride;
          for (int64_t t = 0; t < tokens; t += kPanel) {
            o.width = tokens - t < kPanel ? tokens - t : kPanel;
            o.b = panel_words(format, static_cast<const uint8_t*>(panels) + (t0 + t) * bytes, o.width, k);
            o.column_scale = reinterpret_cast<const float*>(o.b + o.words * o.width);
            o.start = reinterpret_cast<const int32_t*>(o.column_scale + o.width);
            o.acc = acc + (i - i0) * stride + t;
            int8 ? Inner::template multiply<true>(o, ahead) : Inner::template multiply<false>(o, ahead);
          }
        }
      }
      store_transposed(acc, stride, stop - i0, here, format == kI8 ? w.scale + i0 : nullptr, y + t0 * y_stride + i0, y_stride);
    }
  }
}

// Puts kSumBytes of depth of kRun columns into the order of a panel, [columns / 16, words, 16], some rows at a time.
template <class Inner>
struct Ordering {
  const Matrix& w;
  const int format;
  const int64_t first, width;  // columns
  int64_t begin = 0, row = 0, end = 0, whole = 0, at_once = 0;  // rows from `begin` on
  uint32_t* panels = nullptr;
  int32_t* sums = nullptr;  // of each column, times 128, where rows are unsigned
  int64_t late = 0;         // turns to wait, until the first rows are there

  // Starts with the rows from m on, to be done within so many turns.
  void start(int64_t m, int64_t depth, int64_t turns, uint32_t* to, int32_t* to_sums) {
    const int64_t per_word = depth * 4 / kSumBytes, rows = w.count - m < depth ? w.count - m : depth;
    row = 0, begin = m, end = rows > 0 ? rows : 0, whole = (end + 16 * per_word - 1) / (16 * per_word) * (16 * per_word);
    at_once = ((whole + turns - 1) / turns + per_word - 1) / per_word * per_word, panels = to, sums = to_sums, late = 1;
    std::memset(sums, 0, kRun * sizeof(*sums));
  }

  static void turn(void* self) {
    Ordering& o = *static_cast<Ordering*>(self);
    if (o.late) --o.late;
    else o.some(o.at_once);
  }

  void some(int64_t rows) {
    const bool int8 = in_int8(format, true);
    const int64_t per_word = int8 ? 4 : 2, size = whole / per_word * 16;
    alignas(64) static const uint8_t zeros[2 * kRun] = {};
    alignas(64) uint8_t unpacked[2][2 * kRun];
    for (const int64_t stop = row + rows < whole ? row + rows : whole; row < stop; row += per_word) {
      const uint8_t* at[4];
      for (int64_t r = 0; r < per_word; ++r) {
        if (row + r >= end)
          at[r] = zeros;
        else if (int8)
          at[r] = static_cast<const uint8_t*>(w.data) + (begin + row + r) * w.row_bytes + first;
        else
          at[r] = reinterpret_cast<const uint8_t*>(as_bf16(w, format, begin + row + r, first, width, reinterpret_cast<uint16_t*>(unpacked[r])));
      }
      uint32_t* to = panels + row / per_word * 16;
      if (int8)
        pack_four(reinterpret_cast<const int8_t* const*>(at), width, to, size, Inner::kUnsigned ? sums : nullptr);
      else
        pack_pair(reinterpret_cast<const uint16_t*>(at[0]), reinterpret_cast<const uint16_t*>(at[1]), width, to, size);
    }
  }

  // Does the rest.
  void finish() {
    some(whole);
    for (int64_t c = 0; c < kRun; ++c) sums[c] = -sums[c];
  }
};

// y[t * w.columns + d] = sum over all rows m of weight [t, m] * row m [d] for begin <= d < end, begin and end multiples of kPanel, of
// 128 for int4. `weights`: as pack_weights packs them. While some rows are multiplied, the next ones are put into order: a prefetch of
// so many would have their lines evict each other, as rows may be a power of two apart.
template <class Inner>
void rows_sum(const Matrix& w, int format, const void* weights, int64_t batch, int64_t begin, int64_t end, float* y, void* scratch) {
  const bool int8 = in_int8(format, true);
  const int64_t depth = sum_depth(format), tokens = whole_tiles(batch), words = kSumBytes / 4, stride = kRun + 16;
  const int64_t per_word = depth / words;
  uint32_t* panels[2] = {static_cast<uint32_t*>(scratch), static_cast<uint32_t*>(scratch) + kRun * words};
  int32_t* sums[2] = {reinterpret_cast<int32_t*>(panels[1] + kRun * words), reinterpret_cast<int32_t*>(panels[1] + kRun * words) + kRun};
  float* ones = reinterpret_cast<float*>(sums[1] + kRun);
  float* acc = ones + kPanel;  // [vectors, kRun]
  for (int64_t c = 0; c < kPanel; ++c) ones[c] = 1.0f;
  const float* units = weight_units(format, const_cast<void*>(weights), w.count, batch);
  [[maybe_unused]] const typename Inner::Scope scope;
  for (int64_t d = begin; d < end; d += kRun) {
    const int64_t width = end - d < kRun ? end - d : kRun, turns = width / kPanel * Inner::turns(tokens, kPanel);
    const int64_t from = format == kBF16 ? 2 * d : format == kI8 ? d : d / 2, part = format == kBF16 ? 2 * width : format == kI8 ? width : width / 2;
    std::memset(acc, 0, tokens * stride * sizeof(float));
    Ordering<Inner> ordering{w, format, d, width};
    ordering.start(0, depth, 1, panels[0], sums[0]);
    for (int64_t m = 0, block = 0; m < w.count; m += depth, ++block) {
      ordering.finish();
      const int64_t whole = ordering.whole, now = block % 2, then = m + depth < w.count ? m + depth : w.count;
      ordering.start(then, depth, turns > 2 ? turns - 2 : 1, panels[1 - now], sums[1 - now]);
      Ahead ahead(w, then, ordering.end, from, part, 0, turns * (whole / per_word / 16));
      ahead.order = Ordering<Inner>::turn, ahead.orderer = &ordering;
      for (int64_t c = 0; c < width; c += kPanel) {
        Blocks o;
        o.a = static_cast<const uint8_t*>(weights) + block * tokens * kSumStride, o.a_stride = kSumStride, o.rows = tokens;
        o.b = panels[now] + c * (whole / per_word), o.width = kPanel, o.words = whole / per_word;
        o.row_scale = units + block * tokens, o.column_scale = ones, o.start = sums[now] + c;
        o.acc = acc + c, o.stride = stride;
        int8 ? Inner::template multiply<true>(o, ahead) : Inner::template multiply<false>(o, ahead);
      }
    }
    for (int64_t t = 0; t < batch; ++t) {
      float* out = y + t * w.columns + d;
      const float* from_acc = acc + t * stride;
      if (!int8) {
        std::memcpy(out, from_acc, width * sizeof(float));
        continue;
      }
      for (int64_t c = 0; c < width; c += 4) std::memcpy(out + c, from_acc + c / kPanel * kPanel + panel_place(c % kPanel), 16);
    }
  }
}

int64_t product_bytes(int64_t batch) {
  const int64_t dot = kMostRows * (kMostTokens + 16) * 4 + 64 * 4 + 48 * kRoomStride;
  const int64_t sum = 2 * kRun * (kSumBytes + 4) + 4 * kPanel + 4 * whole_tiles(batch) * (kRun + 16);
  return (dot > sum ? dot : sum) + 64;
}

// What an instruction set can multiply: int8 vectors with int8 and int4 rows; and, with kBF16, bf16 vectors with bf16 and int4 rows.
template <class Inner>
bool has_product(int format, bool transposed) {
  return in_int8(format, transposed) || (Inner::kBF16 && (format == kBF16 || format == kI4));
}

template <class Inner>
constexpr Products products_of() {
  return {has_product<Inner>, vector_bytes, pack_panel, rows_product<Inner>, weight_bytes, pack_weights, rows_sum<Inner>, product_bytes};
}

}  // namespace
}  // namespace FALCON_ISA
}  // namespace falcon
