// XLA custom calls (typed FFI) over the row kernels: every buffer is checked here, then the work is shared out on XLA's own
// intra-op thread pool. What a call computes does not depend on who takes which share.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace falcon {
namespace {

// ---- which instruction set

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> out;  // best first
#if defined(__x86_64__)
  for (const Kernels* k : {&kAvx512Bf16, &kAvx512Vnni, &kAvx512, &kAvx2})
    if (k->supported()) out.push_back(k);
#endif
  out.push_back(&kPlain);
  return out;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{available().front()};
  return kernels;
}

// ---- threads

constexpr int64_t kBytesPerThread = 64 << 10;
constexpr int64_t kShareBytes = 256 << 10, kSumShareBytes = 512 << 10;
constexpr auto kLinger = std::chrono::microseconds(200);  // longer than what a layer does between two kernels

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until done() holds, for kLinger at most; returns whether it holds.
template <class Done>
bool spin_until(const Done& done) {
  const auto end = std::chrono::steady_clock::now() + kLinger;
  while (!done()) {
    if (std::chrono::steady_clock::now() > end) return false;
    for (int i = 0; i < 16; ++i) pause();
    std::this_thread::yield();  // to a caller whose core this thread was woken on
  }
  return true;
}

// Work in shares, dealt out in one run a thread, so that what a thread asks memory for ahead is its own; who has done its run
// helps with the others'.
class Job {
 public:
  Job(int64_t threads, int64_t shares, std::function<void(int64_t)> body) : body_(std::move(body)), shares_(shares), runs_(threads) {
    for (int64_t t = 0; t < threads; ++t) runs_[t].next = t * shares / threads, runs_[t].end = (t + 1) * shares / threads;
  }

  // Does shares until all are begun. Late threads find none and touch nothing that the caller of parallel_for owns.
  void work() {
    const int64_t threads = static_cast<int64_t>(runs_.size()), me = begun_++;
    int64_t mine = 0;
    for (int64_t t = 0; t < threads; ++t) {
      Run& run = runs_[(me + t) % threads];
      for (int64_t i = run.next++; i < run.end; i = run.next++, ++mine) body_(i);
    }
    if (!mine || (done_ += mine) < shares_) return;
    std::lock_guard<std::mutex> lock(mutex_);
    finished_.notify_all();
  }

  void wait() {
    const auto done = [this] { return done_ == shares_; };
    if (spin_until(done)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, done);
  }

 private:
  struct alignas(64) Run {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const std::function<void(int64_t)> body_;
  const int64_t shares_;
  std::vector<Run> runs_;
  std::atomic<int64_t> begun_{0}, done_{0};
  std::mutex mutex_;
  std::condition_variable finished_;
};

// Threads of the pool that work on what was posted last and then stay awake a moment for the next kernel: waking one up takes
// as long as reading a megabyte.
class Crew {
 public:
  static Crew& of_process() {
    static Crew* crew = new Crew;  // never destroyed: threads may outlive the end of main
    return *crew;
  }

  void post(ffi::ThreadPool& pool, std::shared_ptr<Job> job, int64_t helpers) {
    int64_t missing;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = std::move(job);
      ++posted_;
      missing = std::max<int64_t>(helpers - size_, 0);
      size_ += missing;
    }
    for (int64_t i = 0; i < missing; ++i) pool.Schedule([this] { serve(); });
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (uint64_t seen = 0; seen != posted_;) {  // nobody leaves without having looked
      seen = posted_;
      const std::shared_ptr<Job> job = job_;
      lock.unlock();
      job->work();
      spin_until([&] { return posted_ != seen; });
      lock.lock();
    }
    --size_;
  }

  std::mutex mutex_;
  std::shared_ptr<Job> job_;  // what it refers to may be gone once all its shares are begun
  std::atomic<uint64_t> posted_{0};
  int64_t size_ = 0;  // called or here
};

// Calls body(i) for 0 <= i < n, on the calling thread and as many of the pool's as are free. The caller waits only for shares
// that somebody has begun, so that a call from inside the pool cannot wait for itself.
// `bytes` is what all shares read together: little is not worth a second thread.
template <class Body>
void parallel_for(ffi::ThreadPool& pool, int64_t n, int64_t bytes, const Body& body) {
  const int64_t threads = std::min({pool.num_threads(), n, bytes / kBytesPerThread});
  if (threads < 2) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  const auto job = std::make_shared<Job>(threads, n, [&body](int64_t i) { body(i); });
  Crew::of_process().post(pool, job, threads - 1);
  job->work();
  job->wait();
}

// Memory that a thread keeps from call to call, aligned for vectors.
void* scratch(int64_t bytes, int slot) {
  struct Slot {
    std::unique_ptr<char[]> memory;
    int64_t size = 0;
  };
  thread_local Slot slots[2];
  Slot& s = slots[slot];
  if (s.size < bytes + 64) {
    s.memory.reset(new char[bytes + 64]);
    s.size = bytes + 64;
  }
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(s.memory.get()) + 63) / 64 * 64);
}

// Rows a share: few enough that the threads finish together.
int64_t share_rows(int64_t rows, int64_t row_bytes, int64_t threads) {
  const int64_t by_bytes = kShareBytes / std::max<int64_t>(row_bytes, 1);
  const int64_t by_threads = rows / (8 * threads);
  return std::max<int64_t>(8, std::min(by_bytes, by_threads) / 8 * 8);
}

// Shares of a sum, each of which costs a vector of the result: a thread's get smaller and smaller, so that few of them let the
// threads finish together.
struct SumShares {
  int64_t threads, each;  // shares a thread

  SumShares(int64_t bytes, int64_t most)
      : threads(std::clamp<int64_t>(bytes / kSumShareBytes, 1, most)),
        each(threads == 1 ? 1 : std::clamp<int64_t>(bytes / threads / kSumShareBytes, 1, 4)) {}
  int64_t count() const { return threads * each; }
  int64_t begin(int64_t i, int64_t rows) const {
    const int64_t whole = (1 << each) - 1, before = whole + 1 - (1 << (each - i % each));  // 8, 4, 2 and 1 of 15
    return (i / each * whole + before) * rows / (threads * whole);
  }
};

// ---- checks

ffi::Error invalid(const std::string& text) { return ffi::Error::InvalidArgument("falcon_relu: " + text); }

int format_of(ffi::DataType type) {
  switch (type) {
    case ffi::F32: return kF32;
    case ffi::BF16:
    case ffi::U16: return kBF16;  // its bits
    case ffi::F16: return kF16;
    case ffi::S8: return kI8;
    default: return -1;
  }
}

using Numbers = ffi::Buffer<ffi::S32>;

// `index` and `count`: of a gathered matrix, else null.
std::string check_matrix(const ffi::AnyBuffer& w, const ffi::Buffer<ffi::F32>& scale, const Numbers* index, const Numbers* count,
                         Matrix* out) {
  if (format_of(w.element_type()) < 0) return "rows must be f32, bf16, f16 or int8";
  if (w.dimensions().size() != 2) return "rows must be a matrix";
  const int64_t rows = w.dimensions()[0], columns = w.dimensions()[1];
  if (columns < 1 || columns > (1 << 19)) return "rows must be 1 to 524288 wide, not " + std::to_string(columns);
  const int64_t scales = scale.element_count();
  if (scales != 0 && scales != rows) return std::to_string(scales) + " scales for " + std::to_string(rows) + " rows";
  if (format_of(w.element_type()) == kI8 && scales != rows) return "int8 rows need scales";
  *out = Matrix{w.untyped_data(), scales ? scale.typed_data() : nullptr, nullptr, rows, columns};
  if (!index) return "";
  if (count->element_count() != 1) return "count must be one number";
  const int64_t capacity = index->element_count(), n = count->typed_data()[0];
  if (n < 0 || n > capacity) return "count " + std::to_string(n) + " of " + std::to_string(capacity) + " indices";
  const int32_t* ids = index->typed_data();
  uint32_t largest = 0;  // as unsigned numbers, negative ones are larger than any row
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, static_cast<uint32_t>(ids[i]));
  if (n && largest >= rows)
    return "an index is " + std::to_string(static_cast<int32_t>(largest)) + ", the matrix has " + std::to_string(rows) + " rows";
  out->index = ids, out->count = n;
  return "";
}

// ---- rows x vectors

ffi::Error rows_dot(ffi::ThreadPool pool, ffi::AnyBuffer w, ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::S32> index,
                    ffi::Buffer<ffi::S32> count, ffi::BufferR2<ffi::F32> x, ffi::ResultBufferR2<ffi::F32> y, bool gathered) {
  Matrix m;
  if (auto wrong = check_matrix(w, scale, gathered ? &index : nullptr, &count, &m); !wrong.empty()) return invalid(wrong);
  const int64_t batch = x.dimensions()[0], outputs = y->dimensions()[1];
  if (x.dimensions()[1] != m.columns) return invalid("vectors and rows differ in width");
  const int64_t expected = gathered ? static_cast<int64_t>(index.element_count()) : m.count;
  if (y->dimensions()[0] != batch || outputs != expected) return invalid("the result has the wrong shape");
  const Kernels& kernels = *chosen();
  const int format = format_of(w.element_type());
  const Packed packed =
      kernels.pack_x(format, x.typed_data(), m.columns, batch, scratch(kernels.packed_bytes(format, m.columns, batch), 0));
  float* out = y->typed_data();
  const int64_t row_bytes = m.columns * item_bytes(format);
  const int64_t share = share_rows(m.count, row_bytes, std::max<int64_t>(pool.num_threads(), 1));
  const int64_t shares = std::max<int64_t>((m.count + share - 1) / share, 1), rest = outputs - m.count;
  parallel_for(pool, shares, m.count * row_bytes, [&](int64_t i) {
    kernels.dot[format](m, packed, std::min(m.count, i * share), std::min(m.count, (i + 1) * share), out, outputs);
    for (int64_t b = 0; b < batch; ++b) {  // 0 where no row was asked for
      float* none = out + b * outputs + m.count;
      std::fill(none + rest * i / shares, none + rest * (i + 1) / shares, 0.0f);
    }
  });
  return ffi::Error::Success();
}

// The rows whose weight is not 0 in every vector of the batch: their numbers, and their weights side by side.
struct Compact {
  std::vector<int32_t> index;
  std::vector<float> h;
};

Compact without_zeros(const Matrix& m, const float* h, int64_t h_stride, int64_t batch) {
  std::vector<int32_t> position(m.count);
  int64_t n = 0;
  for (int64_t i = 0; i < m.count; ++i) {  // without a branch that nobody could predict
    bool wanted = false;
    for (int64_t b = 0; b < batch; ++b) wanted |= h[b * h_stride + i] != 0.0f;
    position[n] = static_cast<int32_t>(i);
    n += wanted;
  }
  Compact out{std::vector<int32_t>(n), std::vector<float>(batch * n)};
  for (int64_t i = 0; i < n; ++i) out.index[i] = static_cast<int32_t>(m.row(position[i]));
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < n; ++i) out.h[b * n + i] = h[b * h_stride + position[i]];
  return out;
}

ffi::Error weighted_row_sum(ffi::ThreadPool pool, ffi::AnyBuffer w, ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::S32> index,
                            ffi::Buffer<ffi::S32> count, ffi::BufferR2<ffi::F32> h, ffi::ResultBufferR2<ffi::F32> y,
                            bool gathered, bool skip_zeros) {
  Matrix m;
  if (auto wrong = check_matrix(w, scale, gathered ? &index : nullptr, &count, &m); !wrong.empty()) return invalid(wrong);
  const int64_t batch = h.dimensions()[0];
  int64_t h_stride = h.dimensions()[1];
  if (h_stride != (gathered ? static_cast<int64_t>(index.element_count()) : m.count))
    return invalid("there must be one weight a row");
  if (y->dimensions()[0] != batch || y->dimensions()[1] != m.columns) return invalid("the result has the wrong shape");
  const float* weights = h.typed_data();
  Compact compact;
  if (skip_zeros) {
    compact = without_zeros(m, weights, h_stride, batch);
    m.index = compact.index.data(), m.count = h_stride = static_cast<int64_t>(compact.index.size());
    weights = compact.h.data();
  }
  const Kernels& kernels = *chosen();
  const int format = format_of(w.element_type());
  // A share is a run of whole rows, which memory likes best; the shares' sums are added up in their order.
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1), stride = padded(m.columns);
  const int64_t bytes = m.count * m.columns * item_bytes(format);
  const SumShares cut(bytes, threads);
  const int64_t shares = cut.count();
  float* sums = static_cast<float*>(scratch(shares * batch * stride * sizeof(float), 0));
  parallel_for(pool, shares, bytes, [&](int64_t i) {
    const int64_t begin = cut.begin(i, m.count), end = cut.begin(i + 1, m.count);
    void* memory = scratch(kernels.sum_bytes(end - begin, batch), 1);
    kernels.sum[format](m, weights, h_stride, batch, begin, end, sums + i * batch * stride, memory);
  });
  const int64_t run = padded((m.columns + threads - 1) / threads), runs = (m.columns + run - 1) / run;
  parallel_for(pool, batch * runs, shares * batch * stride * sizeof(float), [&](int64_t i) {
    const int64_t b = i / runs, begin = i % runs * run;
    kernels.unpack[format](sums + b * stride, shares, batch * stride, begin, std::min(m.columns, begin + run),
                           y->typed_data() + b * m.columns);
  });
  return ffi::Error::Success();
}

// ---- matrix products

const Products* products() {
#if defined(__x86_64__)
  if (kAvx512Bf16.supported()) return &avx512_bf16::kProducts;
#endif
  return nullptr;
}

// Of the first `count` vectors; the results of the others are 0.
ffi::Error rows_product(ffi::ThreadPool pool, ffi::AnyBuffer w, ffi::Buffer<ffi::F32> scale, ffi::BufferR2<ffi::F32> x,
                        ffi::Buffer<ffi::S32> count, ffi::ResultBufferR2<ffi::F32> y, bool transposed) {
  Matrix m;
  if (auto wrong = check_matrix(w, scale, nullptr, nullptr, &m); !wrong.empty()) return invalid(wrong);
  const Products* p = products();
  const int format = format_of(w.element_type());
  if (!p || (format != kBF16 && format != kI8)) return invalid("no matrix products for this CPU or format");
  const int64_t vectors = x.dimensions()[0], inputs = transposed ? m.count : m.columns, outputs = transposed ? m.columns : m.count;
  if (x.dimensions()[1] != inputs || y->dimensions()[0] != vectors || y->dimensions()[1] != outputs || count.element_count() != 1)
    return invalid("the product has the wrong shape");
  const int64_t batch = std::clamp<int64_t>(count.typed_data()[0], 0, vectors);
  if (m.columns % 64 || m.count % 2) return invalid("matrix products need columns in sixty-fours and rows in twos");
  std::fill(y->typed_data() + batch * outputs, y->typed_data() + vectors * outputs, 0.0f);
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1), bytes = m.count * m.columns * item_bytes(format);
  if (transposed) {
    std::vector<uint16_t> blocks(batch * m.count);
    parallel_for(pool, batch, 4 * batch * m.count, [&](int64_t t) {
      p->pack_weights(x.typed_data() + t * m.count, m.scale, m.count, batch, t, blocks.data());
    });
    constexpr int64_t share = 256;  // columns
    parallel_for(pool, (m.columns + share - 1) / share, bytes, [&](int64_t i) {
      p->sum(m, format, blocks.data(), batch, i * share, std::min(m.columns, (i + 1) * share), y->typed_data(),
             scratch(p->scratch_bytes(batch), 1));
    });
    return ffi::Error::Success();
  }
  const int64_t tokens = (batch + 15) / 16 * 16;
  std::vector<uint32_t> panels(tokens * m.columns / 2);
  parallel_for(pool, (tokens + 63) / 64, 4 * batch * m.columns, [&](int64_t i) {
    p->pack_panel(x.typed_data(), m.columns, batch, 64 * i, std::min<int64_t>(4, tokens / 16 - 4 * i),
                  panels.data() + 32 * i * m.columns);
  });
  const int64_t share = std::max<int64_t>(48, std::min<int64_t>(480, m.count / (8 * threads)) / 48 * 48);
  parallel_for(pool, (m.count + share - 1) / share, bytes, [&](int64_t i) {
    p->dot(m, format, panels.data(), batch, i * share, std::min(m.count, (i + 1) * share), y->typed_data(), m.count,
           scratch(p->scratch_bytes(batch), 1));
  });
  return ffi::Error::Success();
}

// ---- which neurons

constexpr int kBins = 4096, kBinShift = 20, kCounters = 2;  // of a bin: the next key must not wait for the one before

// Writes the positions of the `most` highest keys, in order, the first ones of equal keys; more keys than that are above 0. Bins
// of the leading bits leave few keys to compare.
void highest(const Kernels& kernels, const uint32_t* key, int64_t n, int64_t most, int32_t* out) {
  if (most == 0) return;
  int32_t bins[kCounters][kBins] = {};
  for (int64_t i = 0; i < n; ++i) ++bins[i % kCounters][key[i] >> kBinShift];
  for (int c = 1; c < kCounters; ++c)
    for (int bin = 0; bin < kBins; ++bin) bins[0][bin] += bins[c][bin];
  int64_t above = 0;
  uint32_t bin = kBins - 1;
  while (above + bins[0][bin] < most) above += bins[0][bin--];
  const int64_t found = kernels.at_least(key, n, std::max(bin << kBinShift, 1u), out);
  std::vector<uint32_t> inside;  // of the bin that the cut goes through
  for (int64_t i = 0; i < found; ++i)
    if (key[out[i]] >> kBinShift == bin) inside.push_back(key[out[i]]);
  const auto nth = inside.begin() + (most - above - 1);
  std::nth_element(inside.begin(), nth, inside.end(), std::greater<uint32_t>());
  const uint32_t cut = *nth;
  int64_t ties = most - above - std::count_if(inside.begin(), inside.end(), [cut](uint32_t k) { return k > cut; }), kept = 0;
  for (int64_t i = 0; i < found; ++i) {
    const bool tied = key[out[i]] == cut, stays = key[out[i]] > cut || (tied && ties > 0);
    ties -= tied;
    out[kept] = out[i];
    kept += stays;
  }
}

ffi::Error select(ffi::BufferR2<ffi::F32> score, ffi::Buffer<ffi::F32> threshold, ffi::Buffer<ffi::S32> budget,
                  ffi::ResultBufferR1<ffi::S32> index, ffi::Result<ffi::Buffer<ffi::S32>> count) {
  const int64_t batch = score.dimensions()[0], neurons = score.dimensions()[1];
  if (threshold.element_count() != 1 || budget.element_count() != 1) return invalid("threshold and budget must be numbers");
  if (static_cast<int64_t>(index->element_count()) != neurons || count->element_count() != 1)
    return invalid("the result has the wrong shape");
  const float least = threshold.typed_data()[0];
  const int64_t most = std::clamp<int64_t>(budget.typed_data()[0], 0, neurons);
  const Kernels& kernels = *chosen();
  uint32_t* key = static_cast<uint32_t*>(scratch(neurons * sizeof(uint32_t), 0));  // 0 where no score reaches the threshold
  std::memset(key, 0, neurons * sizeof(uint32_t));
  for (int64_t b = 0; b < batch; ++b) kernels.rank(score.typed_data() + b * neurons, neurons, least, key);
  int32_t* out = index->typed_data();
  int64_t n = kernels.at_least(key, neurons, 1, out);
  if (n > most) highest(kernels, key, neurons, most, out), n = most;
  std::fill(out + n, out + neurons, static_cast<int32_t>(neurons));
  count->typed_data()[0] = static_cast<int32_t>(n);
  return ffi::Error::Success();
}

// ---- attention

using Heads = ffi::Buffer<ffi::F32, 5>;

ffi::Error attend(ffi::ThreadPool pool, Heads q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                  ffi::BufferR2<ffi::S32> length, ffi::BufferR2<ffi::F32> bias, ffi::Result<Heads> out,
                  float softmax_scale) {
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
  const Kernels& kernels = *chosen();
  constexpr int64_t heads = 16;  // query heads a share
  const int64_t shares = (group + heads - 1) / heads;
  const int64_t item = item_bytes(format), stride = kv_heads * width;
  // Queries of one KV head after the other: they see the same keys.
  parallel_for(pool, batch * kv_heads * queries * shares, kv_heads * group * seen * width, [&](int64_t i) {
    const int64_t first = i % shares * heads, t = i / shares % queries, kv = i / shares / queries % kv_heads;
    const int64_t b = i / shares / queries / kv_heads, n = std::min(heads, group - first);
    const int64_t at = ((b * queries + t) * kv_heads + kv) * group + first;
    const int64_t valid = length.typed_data()[b * queries + t], offset = (b * positions * kv_heads + kv) * width * item;
    float* memory = static_cast<float*>(scratch(kernels.attend_bytes(n, width, valid), 1));
    kernels.attend[format](q.typed_data() + at * width, n, width, static_cast<char*>(k.untyped_data()) + offset,
                           static_cast<char*>(v.untyped_data()) + offset, stride, valid,
                           biased ? bias.typed_data() + (kv * group + first) * bias.dimensions()[1] : nullptr,
                           biased ? bias.dimensions()[1] : 0, softmax_scale, out->typed_data() + at * width, memory);
  });
  return ffi::Error::Success();
}

// ---- what memory delivers

ffi::Error read_rows(ffi::ThreadPool pool, ffi::AnyBuffer w, ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::S32> index,
                     ffi::Buffer<ffi::S32> count, ffi::Buffer<ffi::S32> seen, ffi::Result<ffi::Buffer<ffi::S32>> out,
                     bool gathered) {
  Matrix m;
  if (auto wrong = check_matrix(w, scale, gathered ? &index : nullptr, &count, &m); !wrong.empty()) return invalid(wrong);
  const Kernels& kernels = *chosen();
  const int64_t row_bytes = m.columns * item_bytes(format_of(w.element_type()));
  const int64_t share = share_rows(m.count, row_bytes, std::max<int64_t>(pool.num_threads(), 1));
  std::atomic<int64_t> all{seen.typed_data()[0]};
  parallel_for(pool, (m.count + share - 1) / share, m.count * row_bytes, [&](int64_t i) {
    all ^= kernels.read(m, row_bytes, i * share, std::min(m.count, (i + 1) * share));
  });
  out->typed_data()[0] = static_cast<int32_t>(all);
  return ffi::Error::Success();
}

#define FALCON_MATRIX       \
  Ctx<ffi::ThreadPool>()    \
      .Arg<ffi::AnyBuffer>() \
      .Arg<ffi::Buffer<ffi::F32>>() \
      .Arg<ffi::Buffer<ffi::S32>>() \
      .Arg<ffi::Buffer<ffi::S32>>()

}  // namespace
}  // namespace falcon

XLA_FFI_DEFINE_HANDLER_SYMBOL(falcon_rows_dot, falcon::rows_dot,
                              ffi::Ffi::Bind()
                                  .FALCON_MATRIX.Arg<ffi::BufferR2<ffi::F32>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>()
                                  .Attr<bool>("gathered"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(falcon_weighted_row_sum, falcon::weighted_row_sum,
                              ffi::Ffi::Bind()
                                  .FALCON_MATRIX.Arg<ffi::BufferR2<ffi::F32>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>()
                                  .Attr<bool>("gathered")
                                  .Attr<bool>("skip_zeros"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(falcon_rows_product, falcon::rows_product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>()
                                  .Attr<bool>("transposed"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(falcon_select, falcon::select,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::BufferR1<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(falcon_attend, falcon::attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<falcon::Heads>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR2<ffi::S32>>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Ret<falcon::Heads>()
                                  .Attr<float>("softmax_scale"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(falcon_read_rows, falcon::read_rows,
                              ffi::Ffi::Bind()
                                  .FALCON_MATRIX.Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<bool>("gathered"));

// Names of the instruction sets that this CPU has, best first, separated by commas.
extern "C" const char* falcon_instruction_sets() {
  static const std::string names = [] {
    std::string out;
    for (const falcon::Kernels* k : falcon::available()) out += (out.empty() ? "" : ",") + std::string(k->name);
    return out;
  }();
  return names.c_str();
}

extern "C" const char* falcon_instruction_set() { return falcon::chosen().load()->name; }

// Whether this CPU has matrix products in bf16.
extern "C" bool falcon_has_products() { return falcon::products() != nullptr; }

// Uses the named instruction set from now on; false if this CPU lacks it.
extern "C" bool falcon_use_instruction_set(const char* name) {
  for (const falcon::Kernels* k : falcon::available())
    if (!std::strcmp(k->name, name)) {
      falcon::chosen() = k;
      return true;
    }
  return false;
}
