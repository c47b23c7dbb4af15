// XLA custom call: the choice of the neurons to read.
#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

#include "checks.h"
#include "dispatch.h"
#include "threads.h"

namespace falcon {
namespace {

using Bools = ffi::BufferR2<ffi::PRED>;

// Keys are counted in bins by their leading 12 bits. Two sets of counters, so that increments do not wait for each other.
constexpr int kBins = 4096, kBinShift = 20, kCounters = 2;

// Writes the positions of the `most` highest keys, ascending; of equal keys the first ones. Needs more than `most` keys above 0.
void highest(const Kernels& k, const uint32_t* key, int64_t n, int64_t most, int32_t* out) {
  if (most == 0) return;
  int32_t bins[kCounters][kBins] = {};
  for (int64_t i = 0; i < n; ++i) ++bins[i % kCounters][key[i] >> kBinShift];
  for (int c = 1; c < kCounters; ++c)
    for (int bin = 0; bin < kBins; ++bin) bins[0][bin] += bins[c][bin];
  int64_t above = 0;
  uint32_t bin = kBins - 1;
  while (above + bins[0][bin] < most) above += bins[0][bin--];
  const int64_t found = k.at_least(key, n, std::max(bin << kBinShift, 1u), out);
  std::vector<uint32_t> inside;  // the keys in the bin of the lowest chosen key
  for (int64_t i = 0; i < found; ++i)
    if (key[out[i]] >> kBinShift == bin) inside.push_back(key[out[i]]);
  const auto nth = inside.begin() + (most - above - 1);
  std::nth_element(inside.begin(), nth, inside.end(), std::greater<uint32_t>());
  const uint32_t lowest = *nth;
  int64_t ties = most - above - std::count_if(inside.begin(), inside.end(), [lowest](uint32_t x) { return x > lowest; }), kept = 0;
  for (int64_t i = 0; i < found; ++i) {
    const bool tied = key[out[i]] == lowest, stays = key[out[i]] > lowest || (tied && ties > 0);
    ties -= tied;
    out[kept] = out[i];
    kept += stays;
  }
}

// The neurons of one sequence: writes their numbers, ascending, and returns how many there are. `out` has space for n.
int64_t choose(const Kernels& k, const float* score, int64_t n, float least, int64_t most, uint32_t* key, int32_t* out) {
  k.rank(score, n, least, key);
  const int64_t found = k.at_least(key, n, 1, out);
  if (found <= most) return found;
  highest(k, key, n, most, out);
  return most;
}

// The neurons that each sequence chooses, and an index of those that any chooses; infer.kernels.xla.select defines it.
ffi::Error select(FloatMatrix score, Floats threshold, Ints budget, ffi::ResultBufferR1<ffi::S32> index, ffi::Result<Ints> count,
                  ffi::Result<Bools> chosen) {
  const int64_t batch = score.dimensions()[0], neurons = score.dimensions()[1];
  if (threshold.element_count() != 1 || budget.element_count() != 1) return invalid("threshold and budget must be numbers");
  if (static_cast<int64_t>(index->element_count()) != neurons || count->element_count() != 1 ||
      chosen->dimensions()[0] != batch || chosen->dimensions()[1] != neurons)
    return invalid("the result has the wrong shape");
  const float least = threshold.typed_data()[0];
  const int64_t most = std::clamp<int64_t>(budget.typed_data()[0], 0, neurons);
  const Kernels& k = kernels();
  // Scratch: keys of a sequence; for several sequences also flags: neurons that any chose, then those that each chose.
  const int64_t flags = batch > 1 ? (batch + 1) * neurons : 0;
  uint32_t* key = static_cast<uint32_t*>(scratch(neurons * sizeof(uint32_t) + flags, Scratch::kCall));
  uint8_t *any = reinterpret_cast<uint8_t*>(key + neurons), *mine = any + neurons;
  int32_t* out = index->typed_data();
  bool* mask = chosen->typed_data();
  std::memset(mask, 0, batch * neurons);
  int64_t n = 0;
  if (batch == 1) {
    n = choose(k, score.typed_data(), neurons, least, most, key, out);
    std::fill(mask, mask + n, true);
  } else {
    std::memset(any, 0, flags);
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t found = choose(k, score.typed_data() + b * neurons, neurons, least, most, key, out);
      for (int64_t i = 0; i < found; ++i) mine[b * neurons + out[i]] = any[out[i]] = 1;
    }
    for (int64_t f = 0; f < neurons; ++f) out[n] = static_cast<int32_t>(f), n += any[f];
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < n; ++i) mask[b * neurons + i] = mine[b * neurons + out[i]];
  }
  std::fill(out + n, out + neurons, static_cast<int32_t>(neurons));
  count->typed_data()[0] = static_cast<int32_t>(n);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace falcon

XLA_FFI_DEFINE_HANDLER_SYMBOL(falcon_select, falcon::Guarded<falcon::select>::call,
                              falcon::ffi::Ffi::Bind()
                                  .Arg<falcon::FloatMatrix>()
                                  .Arg<falcon::Floats>()
                                  .Arg<falcon::Ints>()
                                  .Ret<falcon::ffi::BufferR1<falcon::ffi::S32>>()
                                  .Ret<falcon::Ints>()
                                  .Ret<falcon::Bools>());
