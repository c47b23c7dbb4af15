// XLA custom calls on rows: products of rows with vectors, weighted sums of rows, and plain reading.
#include <algorithm>
#include <atomic>
#include <vector>

#include "checks.h"
#include "dispatch.h"
#include "threads.h"

namespace falcon {
namespace {

constexpr int64_t kChunkBytes = 256 << 10, kPartBytes = 512 << 10;

// Rows a task: few enough that the threads finish at about the same time.
int64_t chunk_rows(int64_t rows, int64_t row_bytes, int64_t threads) {
  const int64_t by_bytes = kChunkBytes / std::max<int64_t>(row_bytes, 1);
  const int64_t by_threads = rows / (8 * threads);
  return std::max<int64_t>(8, std::min(by_bytes, by_threads) / 8 * 8);
}

// y[b, i] = <row i, x_b>; for a gathered matrix, 0 from `count` on.
ffi::Error rows_dot(ffi::ThreadPool pool, ffi::AnyBuffer w, Floats scale, Ints index, Ints count, int64_t columns, int64_t group, FloatMatrix x,
                    ffi::Result<FloatMatrix> y, bool gathered) {
  Matrix m;
  if (auto wrong = check_matrix(w, scale, gathered ? &index : nullptr, &count, columns, group, &m); !wrong.empty()) return invalid(wrong);
  const int64_t batch = x.dimensions()[0], outputs = y->dimensions()[1];
  if (x.dimensions()[1] != m.columns) return invalid("vectors and rows differ in width");
  const int64_t expected = gathered ? static_cast<int64_t>(index.element_count()) : m.count;
  if (y->dimensions()[0] != batch || outputs != expected) return invalid("the result has the wrong shape");
  const Kernels& k = kernels();
  const int format = format_of(w.element_type());
  const Packed packed =
      k.pack_x(format, x.typed_data(), m.columns, batch, scratch(k.packed_bytes(format, m.columns, batch), Scratch::kCall));
  float* out = y->typed_data();
  const int64_t row_bytes = m.row_bytes, chunk = chunk_rows(m.count, row_bytes, thread_count(pool));
  const int64_t chunks = std::max<int64_t>((m.count + chunk - 1) / chunk, 1), unused = outputs - m.count;
  parallel_for(pool, chunks, m.count * row_bytes, [&](int64_t i) {
    k.dot[format](m, packed, std::min(m.count, i * chunk), std::min(m.count, (i + 1) * chunk), out, outputs);
    for (int64_t b = 0; b < batch; ++b) {
      float* zeros = out + b * outputs + m.count;
      std::fill(zeros + unused * i / chunks, zeros + unused * (i + 1) / chunks, 0.0f);
    }
  });
  return ffi::Error::Success();
}

// The rows whose weight is not 0 in every vector of the batch: their numbers, and their weights side by side.
struct NonZero {
  std::vector<int32_t> index;
  std::vector<float> h;
};

NonZero without_zeros(const Matrix& m, const float* h, int64_t h_stride, int64_t batch) {
  std::vector<int32_t> position(m.count);
  int64_t n = 0;
  for (int64_t i = 0; i < m.count; ++i) {  // no branch: it would be unpredictable
    bool wanted = false;
    for (int64_t b = 0; b < batch; ++b) wanted |= h[b * h_stride + i] != 0.0f;
    position[n] = static_cast<int32_t>(i);
    n += wanted;
  }
  NonZero out{std::vector<int32_t>(n), std::vector<float>(batch * n)};
  for (int64_t i = 0; i < n; ++i) out.index[i] = static_cast<int32_t>(m.row(position[i]));
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < n; ++i) out.h[b * n + i] = h[b * h_stride + position[i]];
  return out;
}

// Divides the rows of a weighted sum into parts, one task each; every part needs a buffer of the size of the result. Each thread
// has a range of rows, divided into parts of 8/15, 4/15, 2/15 and 1/15 of it (fewer parts for small matrices): the last parts are
// small, so that the threads finish at about the same time. The limits of the parts are row numbers of the whole matrix and depend
// on its shape alone, so that one vector's sum is added up in the same order whichever rows the other vectors of a batch need.
class SumParts {
 public:
  SumParts(int64_t rows, int64_t bytes, int64_t threads)
      : rows_(rows),
        ranges_(std::clamp<int64_t>(bytes / kPartBytes, 1, threads)),
        each_(ranges_ == 1 ? 1 : std::clamp<int64_t>(bytes / ranges_ / kPartBytes, 1, 4)) {}

  int64_t count() const { return ranges_ * each_; }

  // Part i has the positions [out[i], out[i + 1]) of the matrix. An index that is not ascending is divided by position.
  std::vector<int64_t> cuts(const Matrix& m) const {
    const bool ascending = m.index && std::is_sorted(m.index, m.index + m.count);
    std::vector<int64_t> out(count() + 1);
    for (int64_t i = 0; i <= count(); ++i)
      out[i] = ascending ? std::lower_bound(m.index, m.index + m.count, cut(i, rows_)) - m.index : cut(i, m.count);
    return out;
  }

 private:
  int64_t cut(int64_t i, int64_t of) const {
    const int64_t all = (1 << each_) - 1, before = (1 << each_) - (1 << (each_ - i % each_));
    return (i / each_ * all + before) * of / (ranges_ * all);
  }

  int64_t rows_, ranges_, each_;
};

// y[b] = sum of h[b, i] * row i.
ffi::Error weighted_row_sum(ffi::ThreadPool pool, ffi::AnyBuffer w, Floats scale, Ints index, Ints count, int64_t columns, int64_t group, FloatMatrix h,
                            ffi::Result<FloatMatrix> y, bool gathered, bool skip_zeros) {
  Matrix m;
  if (auto wrong = check_matrix(w, scale, gathered ? &index : nullptr, &count, columns, group, &m); !wrong.empty()) return invalid(wrong);
  const int64_t batch = h.dimensions()[0], rows = w.dimensions()[0];
  int64_t h_stride = h.dimensions()[1];
  if (h_stride != (gathered ? static_cast<int64_t>(index.element_count()) : m.count))
    return invalid("there must be one weight a row");
  if (y->dimensions()[0] != batch || y->dimensions()[1] != m.columns) return invalid("the result has the wrong shape");
  const Kernels& k = kernels();
  const int format = format_of(w.element_type());
  const int64_t threads = thread_count(pool), stride = sum_width(format, m.columns), row_bytes = m.row_bytes;
  const SumParts parts(rows, h_stride * row_bytes, threads);
  const float* weights = h.typed_data();
  NonZero compact;
  if (skip_zeros) {
    compact = without_zeros(m, weights, h_stride, batch);
    m.index = compact.index.data(), m.count = h_stride = static_cast<int64_t>(compact.index.size());
    weights = compact.h.data();
  }
  const std::vector<int64_t> cuts = parts.cuts(m);
  float* sums = static_cast<float*>(scratch(parts.count() * batch * stride * sizeof(float), Scratch::kCall));
  parallel_for(pool, parts.count(), m.count * row_bytes, [&](int64_t i) {
    const int64_t begin = cuts[i], end = cuts[i + 1];
    void* memory = scratch(k.sum_bytes(m.columns, end - begin, batch), Scratch::kTask);
    k.sum[format](m, weights, h_stride, batch, begin, end, sums + i * batch * stride, memory);
  });
  // Adds up the parts in their order; a task adds up a run of columns.
  const int64_t run = sum_width(format, (m.columns + threads - 1) / threads), runs = (m.columns + run - 1) / run;
  parallel_for(pool, batch * runs, parts.count() * batch * stride * sizeof(float), [&](int64_t i) {
    const int64_t b = i / runs, begin = i % runs * run;
    k.unpack[format](sums + b * stride, parts.count(), batch * stride, begin, std::min(m.columns, begin + run),
                     y->typed_data() + b * m.columns);
  });
  return ffi::Error::Success();
}

// Only reads rows, to measure the memory bandwidth. The result depends on every byte read and on `seen`.
ffi::Error read_rows(ffi::ThreadPool pool, ffi::AnyBuffer w, Floats scale, Ints index, Ints count, int64_t columns, int64_t group, Ints seen,
                     ffi::Result<Ints> out, bool gathered) {
  Matrix m;
  if (auto wrong = check_matrix(w, scale, gathered ? &index : nullptr, &count, columns, group, &m); !wrong.empty()) return invalid(wrong);
  if (seen.element_count() != 1 || out->element_count() != 1) return invalid("`seen` and the result must be one number");
  const Kernels& k = kernels();
  const int64_t row_bytes = m.row_bytes;
  const int64_t chunk = chunk_rows(m.count, row_bytes, thread_count(pool));
  std::atomic<int64_t> all{seen.typed_data()[0]};
  parallel_for(pool, (m.count + chunk - 1) / chunk, m.count * row_bytes, [&](int64_t i) {
    all ^= k.read(m, row_bytes, i * chunk, std::min(m.count, (i + 1) * chunk));
  });
  out->typed_data()[0] = static_cast<int32_t>(all);
  return ffi::Error::Success();
}

auto on_rows() {  // the arguments that all of these calls begin with
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<Floats>().Arg<Ints>().Arg<Ints>().Attr<int64_t>(
      "columns").Attr<int64_t>("group");
}

}  // namespace
}  // namespace falcon

XLA_FFI_DEFINE_HANDLER_SYMBOL(falcon_rows_dot, falcon::Guarded<falcon::rows_dot>::call,
                              falcon::on_rows().Arg<falcon::FloatMatrix>().Ret<falcon::FloatMatrix>().Attr<bool>("gathered"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    falcon_weighted_row_sum, falcon::Guarded<falcon::weighted_row_sum>::call,
    falcon::on_rows().Arg<falcon::FloatMatrix>().Ret<falcon::FloatMatrix>().Attr<bool>("gathered").Attr<bool>("skip_zeros"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(falcon_read_rows, falcon::Guarded<falcon::read_rows>::call,
                              falcon::on_rows().Arg<falcon::Ints>().Ret<falcon::Ints>().Attr<bool>("gathered"));
