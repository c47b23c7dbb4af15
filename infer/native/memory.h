// Blocks of memory, aligned to 64 bytes; large ones in huge pages where the system has them: thousands of pages would not fit the CPU's
// table of addresses.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace falcon {

class Block {
 public:
  Block() = default;
  explicit Block(int64_t bytes) {
    constexpr int64_t kHugePage = 2 << 20;
    const int64_t unit = bytes >= kHugePage / 2 ? kHugePage : 64;
    at_ = std::aligned_alloc(unit, (bytes + unit - 1) / unit * unit + (bytes ? 0 : unit));
    if (!at_) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (unit == kHugePage) madvise(at_, (bytes + unit - 1) / unit * unit, MADV_HUGEPAGE);  // a wish: nothing depends on it
#endif
  }
  ~Block() { std::free(at_); }
  Block(const Block&) = delete;
  Block& operator=(Block&& other) {
    std::swap(at_, other.at_);
    return *this;
  }

  char* at() const { return static_cast<char*>(at_); }

 private:
  void* at_ = nullptr;
};

}  // namespace falcon
