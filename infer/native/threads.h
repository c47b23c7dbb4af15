// Runs a kernel call's tasks on the threads of XLA's intra-op pool; and scratch memory of each thread.
#pragma once

#include <cstdint>
#include <functional>

#include "xla/ffi/api/ffi.h"

namespace falcon {

// Number of threads that a call may use, including the calling one: at least 1.
int64_t thread_count(const xla::ffi::ThreadPool& pool);

// Calls task(i) once for every 0 <= i < n, on the calling thread and on idle threads of the pool, and returns when all are done.
// Rethrows an exception of a task. `bytes`: bytes that all tasks read together; it limits the number of threads.
void parallel_for(xla::ffi::ThreadPool& pool, int64_t n, int64_t bytes, const std::function<void(int64_t)>& task);

// Each thread has two blocks of scratch memory: one for what a call prepares before its tasks, one for a task.
enum class Scratch { kCall, kTask };

// A block of at least `bytes` bytes, aligned to 64 bytes; valid until the calling thread requests the same block again.
void* scratch(int64_t bytes, Scratch block);

}  // namespace falcon
