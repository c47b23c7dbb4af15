// Sortable integer keys of the neurons' scores, and a search for high keys. Included by isa.h.
namespace falcon {
namespace FALCON_ISA {
namespace {

// Writes keys: 0 for a score that is NaN or below `least`, else a number above 0. Keys are ordered like their scores; 0 and -0 have
// the same key.
void rank(const float* score, int64_t n, float least, uint32_t* key) {
  for (int64_t f = 0; f < n; ++f) {
    const float folded = score[f] + 0.0f;
    int32_t bits;
    std::memcpy(&bits, &folded, sizeof(bits));
    const uint32_t ordered = static_cast<uint32_t>(bits ^ (bits >> 31 | INT32_MIN));
    key[f] = score[f] >= least ? ordered : 0;
  }
}

// Writes the positions of the keys >= `least`, ascending; returns how many there are. `out` has space for n.
int64_t at_least(const uint32_t* key, int64_t n, uint32_t least, int32_t* out) {
  int64_t found = 0, f = 0;
#if defined(FALCON_AVX512)
  const __m512i cut = _mm512_set1_epi32(static_cast<int32_t>(least));
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; f + 16 <= n; f += 16) {  // stores 16 numbers; the next store overwrites the unused ones
    const __mmask16 wanted = _mm512_cmpge_epu32_mask(_mm512_loadu_si512(key + f), cut);
    const __m512i position = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int32_t>(f)));
    _mm512_storeu_si512(out + found, _mm512_maskz_compress_epi32(wanted, position));
    found += __builtin_popcount(wanted);
  }
#endif
  for (; f < n; ++f) {
    out[found] = static_cast<int32_t>(f);
    found += key[f] >= least;  // no branch: it would be unpredictable
  }
  return found;
}

}  // namespace
}  // namespace FALCON_ISA
}  // namespace falcon
