// One kernel call's work on several threads of XLA's intra-op pool, and memory that threads keep.
#pragma once

#include <cstdint>
#include <functional>

#include "xla/ffi/api/ffi.h"

namespace falcon {

// Threads that a call may use, the calling one included: at least 1.
int64_t thread_count(const xla::ffi::ThreadPool& pool);

// Calls task(i) once for every 0 <= i < n, on the calling thread and on idle threads of the pool, and returns when all calls have.
// An exception of a task is thrown from here. `bytes`: what all tasks read together; few bytes are not worth a second thread.
void parallel_for(xla::ffi::ThreadPool& pool, int64_t n, int64_t bytes, const std::function<void(int64_t)>& task);

// Two blocks of memory per thread: one for what a call prepares before its tasks, one for what a single task needs.
enum class Scratch { kCall, kTask };

// At least `bytes` bytes, aligned for vectors. They belong to the calling thread until it asks for the same block again.
void* scratch(int64_t bytes, Scratch block);

}  // namespace falcon
