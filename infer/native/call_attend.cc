// XLA custom call: attention over the KV cache.
#include <algorithm>

#include "checks.h"
#include "dispatch.h"
#include "threads.h"

namespace falcon {
namespace {

using Heads = ffi::Buffer<ffi::F32, 5>;

constexpr int64_t kHeads = 16;  // query heads of a task

// Attention of each query over the first `length` positions of its sequence; infer.kernels.xla.attend defines it.
ffi::Error attend(ffi::ThreadPool pool, Heads q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::BufferR2<ffi::S32> length,
                  FloatMatrix bias, ffi::Result<Heads> out, float softmax_scale) {
  const auto qd = q.dimensions();
  const auto kd = k.dimensions(), vd = v.dimensions();
  const int format = format_of(k.element_type());
  if (kd.size() != 4 || !std::equal(kd.begin(), kd.end(), vd.begin(), vd.end()) || k.element_type() != v.element_type())
    return invalid("keys and values must be alike");
  if (format < 0 || format == kI8) return invalid("the cache must be f32, bf16 or f16");
  const int64_t batch = qd[0], queries = qd[1], kv_heads = qd[2], group = qd[3], width = qd[4], positions = kd[1];
  if (kd[0] != batch || kd[2] != kv_heads || kd[3] != width) return invalid("queries and cache differ in shape");
  if (!std::equal(qd.begin(), qd.end(), out->dimensions().begin())) return invalid("the result has the wrong shape");
  if (length.dimensions()[0] != batch || length.dimensions()[1] != queries) return invalid("one length a query");
  int64_t seen = 0;
  for (int64_t i = 0; i < batch * queries; ++i) {
    const int32_t n = length.typed_data()[i];
    if (n < 1 || n > positions)
      return invalid("length " + std::to_string(n) + " in a cache of " + std::to_string(positions) + " positions");
    seen += n;
  }
  const bool biased = bias.element_count() > 0;
  if (biased && (bias.dimensions()[0] != kv_heads * group || bias.dimensions()[1] < positions))
    return invalid("the position bias must be (heads, positions)");
  const Kernels& kernel = kernels();
  const int64_t groups = (group + kHeads - 1) / kHeads, item = item_bytes(format), stride = kv_heads * width;
  // The tasks of one KV head follow each other: they read the same keys.
  parallel_for(pool, batch * kv_heads * queries * groups, kv_heads * group * seen * width, [&](int64_t i) {
    const int64_t first = i % groups * kHeads, t = i / groups % queries, kv = i / groups / queries % kv_heads;
    const int64_t b = i / groups / queries / kv_heads, n = std::min(kHeads, group - first);
    const int64_t at = ((b * queries + t) * kv_heads + kv) * group + first;
    const int64_t valid = length.typed_data()[b * queries + t], offset = (b * positions * kv_heads + kv) * width * item;
    float* memory = static_cast<float*>(scratch(kernel.attend_bytes(n, width, valid), Scratch::kTask));
    kernel.attend[format](q.typed_data() + at * width, n, width, static_cast<char*>(k.untyped_data()) + offset,
                          static_cast<char*>(v.untyped_data()) + offset, stride, valid,
                          biased ? bias.typed_data() + (kv * group + first) * bias.dimensions()[1] : nullptr,
                          biased ? bias.dimensions()[1] : 0, softmax_scale, out->typed_data() + at * width, memory);
  });
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
                                  .Ret<falcon::Heads>()
                                  .Attr<float>("softmax_scale"));
