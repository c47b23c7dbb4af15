// Reading memory in several ways, to find out what it delivers at most. Called by infer/bandwidth.py; independent of the instruction set
// that the kernels use.
#include <cstdint>

#if defined(__x86_64__) && defined(__gnu_linux__)
#define FALCON_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FALCON_CLONES
#endif

namespace {

typedef uint64_t Line __attribute__((vector_size(64), aligned(64), may_alias));

template <int kStreams, int kAhead>
inline __attribute__((always_inline)) uint64_t read_streams(const char* data, int64_t bytes) {
  const int64_t each = bytes / kStreams / 256 * 256;
  Line acc[4] = {};
  for (int64_t at = 0; at < each; at += 256)
    for (int s = 0; s < kStreams; ++s) {
      const char* p = data + s * each + at;
      for (int i = 0; i < 4; ++i) {
        if (kAhead) __builtin_prefetch(p + kAhead + 64 * i, 0, 3);
        acc[i] ^= *reinterpret_cast<const Line*>(p + 64 * i);
      }
    }
  const Line all = acc[0] ^ acc[1] ^ acc[2] ^ acc[3];
  return all[0] ^ all[1] ^ all[2] ^ all[3] ^ all[4] ^ all[5] ^ all[6] ^ all[7];
}

}  // namespace

// Reads `bytes` from `data`, both multiples of 4096, on one thread; returns a number that depends on all of them.
extern "C" FALCON_CLONES uint64_t falcon_read(const char* data, int64_t bytes, int64_t way) {
  switch (way) {
    case 0: return read_streams<1, 0>(data, bytes);
    case 1: return read_streams<1, 2048>(data, bytes);
    case 2: return read_streams<1, 4096>(data, bytes);
    case 3: return read_streams<4, 0>(data, bytes);
    case 4: return read_streams<4, 1024>(data, bytes);
    default: return read_streams<8, 512>(data, bytes);
  }
}
