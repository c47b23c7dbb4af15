#include "threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "memory.h"

namespace falcon {
namespace {

constexpr int64_t kBytesPerThread = 64 << 10;
constexpr auto kSpin = std::chrono::microseconds(200);  // longer than the time between two kernel calls of a layer

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until done() holds, for kSpin at most; returns whether it holds.
template <class Done>
bool spin_until(const Done& done) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  while (!done()) {
    if (std::chrono::steady_clock::now() > end) return false;
    for (int i = 0; i < 16; ++i) pause();
    std::this_thread::yield();  // to a caller that wants this core
  }
  return true;
}

// The tasks of one parallel_for. Every thread starts with its own contiguous range of tasks, so that it prefetches the rows that it
// uses next; when its range is done it takes tasks from the other ranges.
class Job {
 public:
  Job(int64_t threads, int64_t tasks, const std::function<void(int64_t)>& task) : task_(&task), tasks_(tasks), ranges_(threads) {
    for (int64_t t = 0; t < threads; ++t) ranges_[t].next = t * tasks / threads, ranges_[t].end = (t + 1) * tasks / threads;
  }

  // Runs tasks until none is left. A thread that comes later finds none, and must not use task_, which may no longer exist.
  void work() {
    const int64_t threads = static_cast<int64_t>(ranges_.size()), mine = arrived_++;
    int64_t done = 0;
    for (int64_t t = 0; t < threads; ++t) {
      Range& range = ranges_[(mine + t) % threads];
      for (int64_t i = range.next++; i < range.end; i = range.next++, ++done) run(i);
    }
    if (!done || (done_ += done) < tasks_) return;
    std::lock_guard<std::mutex> lock(mutex_);
    finished_.notify_all();
  }

  // Returns when all tasks of all threads are done.
  void wait() {
    const auto done = [this] { return done_ == tasks_; };
    if (!spin_until(done)) {
      std::unique_lock<std::mutex> lock(mutex_);
      finished_.wait(lock, done);
    }
    if (error_) std::rethrow_exception(error_);
  }

 private:
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };

  void run(int64_t i) {
    try {
      (*task_)(i);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      error_ = std::current_exception();
    }
  }

  const std::function<void(int64_t)>* const task_;
  const int64_t tasks_;
  std::vector<Range> ranges_;
  std::atomic<int64_t> arrived_{0}, done_{0};
  std::mutex mutex_;
  std::condition_variable finished_;
  std::exception_ptr error_;
};

// Threads of the pool that work on the job posted last. Between two jobs they spin for kSpin: waking up a thread takes as long as
// reading a megabyte of memory.
class Helpers {
 public:
  static Helpers& of_process() {
    static Helpers* helpers = new Helpers;  // never destroyed: its threads may still run after main has returned
    return *helpers;
  }

  void post(xla::ffi::ThreadPool& pool, std::shared_ptr<Job> job, int64_t wanted) {
    int64_t missing;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = std::move(job);
      ++posted_;
      missing = std::max<int64_t>(wanted - size_, 0);
      size_ += missing;
    }
    for (; missing > 0; --missing) {
      try {
        pool.Schedule([this] { serve(); });
      } catch (const std::bad_alloc&) {  // the job runs with fewer helpers
        std::lock_guard<std::mutex> lock(mutex_);
        size_ -= missing;
        return;
      }
    }
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (uint64_t seen = 0; seen != posted_;) {  // returns only when no job was posted meanwhile
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
  std::shared_ptr<Job> job_;  // the last one posted
  std::atomic<uint64_t> posted_{0};
  int64_t size_ = 0;  // helpers that are scheduled or running
};

}  // namespace

int64_t thread_count(const xla::ffi::ThreadPool& pool) { return std::max<int64_t>(pool.num_threads(), 1); }

// The caller waits only for tasks that other threads have begun, so that a call from a thread of the pool cannot deadlock.
void parallel_for(xla::ffi::ThreadPool& pool, int64_t n, int64_t bytes, const std::function<void(int64_t)>& task) {
  const int64_t threads = std::min({thread_count(pool), n, bytes / kBytesPerThread});
  if (threads < 2) {
    for (int64_t i = 0; i < n; ++i) task(i);
    return;
  }
  const auto job = std::make_shared<Job>(threads, n, task);
  Helpers::of_process().post(pool, job, threads - 1);
  job->work();
  job->wait();
}

void* scratch(int64_t bytes, Scratch block) {
  struct Memory {
    Block block;
    int64_t size = 0;
  };
  thread_local Memory blocks[2];
  Memory& memory = blocks[static_cast<int>(block)];
  if (memory.size < bytes) {
    memory.size = 0;  // stays 0 if the allocation below throws
    memory.block = Block();
    memory.block = Block(bytes);
    memory.size = bytes;
  }
  return memory.block.at();
}

}  // namespace falcon
