// XLA custom calls: products of rows with many vectors at once.
#include <algorithm>
#include <vector>

#include "checks.h"
#include "dispatch.h"
#include "memory.h"
#include "threads.h"

namespace falcon {
namespace {

// y[t, i] = <row i, x_t>; x is [batch, columns].
void rows_times_vectors(ffi::ThreadPool& pool, const Products& p, const Matrix& m, int format, const float* x, int64_t batch, float* y) {
  const int64_t tokens = (batch + 15) / 16 * 16, bytes = p.vector_bytes(format, m.columns);
  const Block panels(tokens * bytes);
  parallel_for(pool, (tokens + 63) / 64, 4 * batch * m.columns, [&](int64_t i) {
    p.pack_panel(format, x, m.columns, batch, 64 * i, std::min<int64_t>(4, tokens / 16 - 4 * i), panels.at() + 64 * i * bytes);
  });
  const int64_t by_threads = m.count / (8 * thread_count(pool)), chunk = std::clamp<int64_t>(by_threads / 96 * 96, 96, 480);
  parallel_for(pool, (m.count + chunk - 1) / chunk, m.count * m.row_bytes, [&](int64_t i) {
    p.dot(m, format, panels.at(), batch, i * chunk, std::min(m.count, (i + 1) * chunk), y, m.count,
          scratch(p.scratch_bytes(batch), Scratch::kTask));
  });
}

// y[t] = sum over m of x_t[m] * row m; x is [batch, rows].
void vectors_times_rows(ffi::ThreadPool& pool, const Products& p, const Matrix& m, int format, const float* x, int64_t batch, float* y) {
  const Block blocks(p.weight_bytes(format, m.count, batch));
  parallel_for(pool, (batch + 15) / 16 * 16, 4 * batch * m.count, [&](int64_t t) {
    p.pack_weights(format, x + t * m.count, format == kI8 ? m.scale : nullptr, m.count, batch, t, blocks.at());
  });
  constexpr int64_t columns = 256;  // of a task
  parallel_for(pool, (m.columns + columns - 1) / columns, m.count * m.row_bytes, [&](int64_t i) {
    p.sum(m, format, blocks.at(), batch, i * columns, std::min(m.columns, (i + 1) * columns), y,
          scratch(p.scratch_bytes(batch), Scratch::kTask));
  });
}

// Products with the first `count` vectors; the results for the others are 0. `transposed`: vectors_times_rows.
ffi::Error rows_product(ffi::ThreadPool pool, ffi::AnyBuffer w, Floats scale, int64_t columns, int64_t group, FloatMatrix x, Ints count,
                        ffi::Result<FloatMatrix> y, bool transposed) {
  Matrix m;
  if (auto wrong = check_matrix(w, scale, nullptr, nullptr, columns, group, &m); !wrong.empty()) return invalid(wrong);
  const Products* p = products();
  const int format = format_of(w.element_type());
  if (!p || format < 0 || !p->has(format, transposed))
    return invalid("this program was compiled for matrix products that the instruction set chosen since does not have: compile it again");
  const int64_t vectors = x.dimensions()[0], inputs = transposed ? m.count : m.columns, outputs = transposed ? m.columns : m.count;
  if (x.dimensions()[1] != inputs || y->dimensions()[0] != vectors || y->dimensions()[1] != outputs || count.element_count() != 1)
    return invalid("the product has the wrong shape");
  if (format != kI4 && m.columns % 64) return invalid("matrix products need a multiple of 64 columns");
  const int64_t batch = std::clamp<int64_t>(count.typed_data()[0], 0, vectors);
  std::fill(y->typed_data() + batch * outputs, y->typed_data() + vectors * outputs, 0.0f);
  const float* from = x.typed_data();
  float* to = y->typed_data();
  const auto run = transposed ? vectors_times_rows : rows_times_vectors;
  if (!batch) return ffi::Error::Success();
  if (format != kI4) return run(pool, *p, m, format, from, batch, to), ffi::Error::Success();
  // int4 columns are multiplied in the order of their codes (int4_column): inputs are put into it, or results out of it.
  const int64_t width = sum_width(format, m.columns), all = m.columns;
  std::vector<float> ordered(batch * width);
  std::vector<int64_t> columns_in_order(width);
  for (int64_t i = 0; i < width; ++i) columns_in_order[i] = int4_column(i);
  const auto each_vector = [&](const auto& exchange) {
    parallel_for(pool, batch, batch * width * sizeof(float), [&](int64_t t) {
      for (int64_t i = 0; i < width; ++i)
        if (const int64_t column = columns_in_order[i]; column < all) exchange(ordered[t * width + i], t * all + column);
    });
  };
  m.columns = width;
  if (!transposed) each_vector([&](float& number, int64_t place) { number = from[place]; });
  run(pool, *p, m, format, transposed ? from : ordered.data(), batch, transposed ? ordered.data() : to);
  if (transposed) each_vector([&](const float& number, int64_t place) { to[place] = number; });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace falcon

XLA_FFI_DEFINE_HANDLER_SYMBOL(falcon_rows_product, falcon::Guarded<falcon::rows_product>::call,
                              falcon::ffi::Ffi::Bind()
                                  .Ctx<falcon::ffi::ThreadPool>()
                                  .Arg<falcon::ffi::AnyBuffer>()
                                  .Arg<falcon::Floats>()
                                  .Attr<int64_t>("columns")
                                  .Attr<int64_t>("group")
                                  .Arg<falcon::FloatMatrix>()
                                  .Arg<falcon::Ints>()
                                  .Ret<falcon::FloatMatrix>()
                                  .Attr<bool>("transposed"));
