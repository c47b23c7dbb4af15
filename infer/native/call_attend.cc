// XLA custom call: attention over the KV cache.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "checks.h"
#include "dispatch.h"
#include "threads.h"

namespace falcon {
namespace {

using Heads = ffi::Buffer<ffi::F32, 5>;

constexpr int64_t kHeads = 16;        // query heads of a task
constexpr int64_t kQueries = 64;      // queries of a task, over several tokens: they share the conversion of keys and values
constexpr int64_t kPositions = 1024;  // of a part: its result is computed alone, on any thread, and parts are added in order
constexpr int64_t kFewTokens = 16;    // with at most so many tokens of a sequence, its parts are tasks of their own

// The result of the parts so far.
struct Sum {
  float *out, *most, *sum;
};

// Adds a part to the parts before it. A query's result depends on nothing but these two.
void add(const Sum& to, const Sum& part, int64_t queries, int64_t width) {
  for (int64_t r = 0; r < queries; ++r) {
    if (part.most[r] == -INFINITY) continue;  // no position there: its result was not written
    const float most = std::max(to.most[r], part.most[r]);
    const float before = std::exp(to.most[r] - most), now = std::exp(part.most[r] - most);
    for (int64_t c = 0; c < width; ++c) to.out[r * width + c] = before * to.out[r * width + c] + now * part.out[r * width + c];
    to.sum[r] = before * to.sum[r] + now * part.sum[r];
    to.most[r] = most;
  }
}

std::string wrong(const Heads& q, const ffi::AnyBuffer& k, const ffi::AnyBuffer& v, const ffi::BufferR2<ffi::S32>& length,
                  const FloatMatrix& bias, const Floats& k_scale, const Floats& v_scale) {
  const auto qd = q.dimensions(), kd = k.dimensions(), vd = v.dimensions();
  const int format = format_of(k.element_type());
  if (kd.size() != 4 || !std::equal(kd.begin(), kd.end(), vd.begin(), vd.end()) || k.element_type() != v.element_type())
    return "keys and values must be alike";
  if (format < 0 || format == kI4) return "the cache must be f32, bf16, f16 or int8";
  if (kd[0] != qd[0] || kd[2] != qd[2] || kd[3] != qd[4]) return "queries and cache differ in shape";
  if (length.dimensions()[0] != qd[0] || length.dimensions()[1] != qd[1]) return "one length a query";
  const int64_t scales = format == kI8 ? kd[0] * kd[1] * kd[2] : 0;
  for (const Floats* scale : {&k_scale, &v_scale})
    if (static_cast<int64_t>(scale->element_count()) != scales)
      return std::to_string(scale->element_count()) + " scales of a cache that needs " + std::to_string(scales);
  for (int64_t i = 0; i < qd[0] * qd[1]; ++i)
    if (const int32_t n = length.typed_data()[i]; n < 1 || n > kd[1])
      return "length " + std::to_string(n) + " in a cache of " + std::to_string(kd[1]) + " positions";
  if (bias.element_count() > 0 && (bias.dimensions()[0] != qd[2] * qd[3] || bias.dimensions()[1] < kd[1]))
    return "the position bias must be (heads, positions)";
  return "";
}

// Attention of each query over the first `length` positions of its sequence; infer.kernels.xla.attend defines it.
ffi::Error attend(ffi::ThreadPool pool, Heads q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::BufferR2<ffi::S32> length,
                  FloatMatrix bias, Floats k_scale, Floats v_scale, ffi::Result<Heads> result, float softmax_scale) {
  if (const auto text = wrong(q, k, v, length, bias, k_scale, v_scale); !text.empty()) return invalid(text);
  const auto qd = q.dimensions();
  if (!std::equal(qd.begin(), qd.end(), result->dimensions().begin())) return invalid("the result has the wrong shape");
  const int format = format_of(k.element_type());
  const int64_t batch = qd[0], tokens = qd[1], kv_heads = qd[2], group = qd[3], width = qd[4], positions = k.dimensions()[1];
  const int64_t item = item_bytes(format), stride = kv_heads * width;
  const Kernels& kernel = kernels();
  const int64_t groups = (group + kHeads - 1) / kHeads, heads = std::min(group, kHeads), together = std::max<int64_t>(kQueries / heads, 1);
  const int64_t tiles = (tokens + together - 1) / together, most_queries = heads * std::min(together, tokens);
  const int32_t* lengths = length.typed_data();
  const int64_t longest = *std::max_element(lengths, lengths + batch * tokens);
  const int64_t parts = (longest + kPositions - 1) / kPositions, split = tokens <= kFewTokens ? parts : 1;
  const int64_t jobs = batch * kv_heads * tiles * groups, floats = most_queries * (width + 2);
  int64_t seen = 0;
  for (int64_t i = 0; i < batch * tokens; ++i) seen += lengths[i];

  float* shared = split > 1 ? static_cast<float*>(scratch(jobs * split * floats * sizeof(float), Scratch::kCall)) : nullptr;
  const auto sums = [&](float* memory) {
    return Sum{memory, memory + most_queries * width, memory + most_queries * (width + 1)};
  };
  // A job is a tile of tokens and a group of heads of one KV head. Jobs of a KV head follow each other: they read the same keys.
  const auto each_query = [&](int64_t job, auto&& visit) {
    const int64_t first = job % groups * kHeads, tile = job / groups % tiles, kv = job / groups / tiles % kv_heads;
    const int64_t b = job / groups / tiles / kv_heads, n = std::min(kHeads, group - first);
    int64_t r = 0;
    for (int64_t t = tile * together; t < std::min(tokens, (tile + 1) * together); ++t)
      for (int64_t g = first; g < first + n; ++g) visit(r++, b, t, kv, g);
    return r;
  };
  const auto finish = [&](int64_t job, const Sum& total) {
    each_query(job, [&](int64_t r, int64_t b, int64_t t, int64_t kv, int64_t g) {
      float* out = result->typed_data() + (((b * tokens + t) * kv_heads + kv) * group + g) * width;
      for (int64_t c = 0; c < width; ++c) out[c] = total.out[r * width + c] / total.sum[r];
    });
  };
  parallel_for(pool, jobs * split, kv_heads * group * seen * width, [&](int64_t i) {
    const int64_t job = i / split, of = i % split;
    std::vector<int64_t> valid(most_queries);
    std::vector<const float*> biases(most_queries);
    int64_t b = 0, kv = 0, end = 0;
    // A task's memory: the kernel's, the queries, a part, and the parts so far.
    const int64_t kernel_bytes = (kernel.attend_bytes(most_queries, width, std::min(kPositions, longest)) + 63) / 64 * 64;
    auto* memory = static_cast<char*>(scratch(kernel_bytes + (3 * floats) * sizeof(float), Scratch::kTask));
    float* queries = reinterpret_cast<float*>(memory + kernel_bytes);
    const int64_t rows = each_query(job, [&](int64_t r, int64_t sequence, int64_t t, int64_t kv_head, int64_t g) {
      b = sequence, kv = kv_head;
      std::memcpy(queries + r * width, q.typed_data() + (((b * tokens + t) * kv_heads + kv) * group + g) * width, width * sizeof(float));
      valid[r] = lengths[b * tokens + t];
      end = std::max(end, valid[r]);
      if (bias.element_count() > 0) biases[r] = bias.typed_data() + (kv * group + g) * bias.dimensions()[1];
    });
    const int64_t offset = (b * positions * kv_heads + kv) * width * item, scales = b * positions * kv_heads + kv;
    const auto attend_part = [&](int64_t part, const Sum& to) {
      const int64_t begin = part * kPositions, stop = std::min(end, begin + kPositions);
      std::fill_n(to.most, rows, -INFINITY);
      if (begin >= stop) return;
      kernel.attend[format]({queries, rows, width, static_cast<char*>(k.untyped_data()) + offset, static_cast<char*>(v.untyped_data()) + offset,
                             stride, format == kI8 ? k_scale.typed_data() + scales : nullptr,
                             format == kI8 ? v_scale.typed_data() + scales : nullptr, kv_heads, valid.data(),
                             bias.element_count() > 0 ? biases.data() : nullptr, softmax_scale, begin, stop, to.out, to.most, to.sum},
                            reinterpret_cast<float*>(memory));
    };
    if (split > 1) return attend_part(of, sums(shared + i * floats));
    const Sum total = sums(queries + floats), next = sums(queries + 2 * floats);
    attend_part(0, total);
    for (int64_t part = 1; part * kPositions < end; ++part) {
      attend_part(part, next);
      add(total, next, rows, width);
    }
    finish(job, total);
  });
  if (split > 1)
    for (int64_t job = 0; job < jobs; ++job) {
      const Sum total = sums(shared + job * split * floats);
      const int64_t rows = each_query(job, [](int64_t, int64_t, int64_t, int64_t, int64_t) {});
      for (int64_t part = 1; part < split; ++part) add(total, sums(shared + (job * split + part) * floats), rows, width);
      finish(job, total);
    }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace falcon

XLA_FFI_DEFINE_HANDLER_SYMBOL(falcon_attend, falcon::Guarded<falcon::attend>::call,
                              falcon::ffi::Ffi::Bind()
                                  .Ctx<falcon::ffi::ThreadPool>()
                                  .Arg<falcon::Heads>()
                                  .Arg<falcon::ffi::AnyBuffer>()
                                  .Arg<falcon::ffi::AnyBuffer>()
                                  .Arg<falcon::ffi::BufferR2<falcon::ffi::S32>>()
                                  .Arg<falcon::FloatMatrix>()
                                  .Arg<falcon::Floats>()
                                  .Arg<falcon::Floats>()
                                  .Ret<falcon::Heads>()
                                  .Attr<float>("softmax_scale"));
