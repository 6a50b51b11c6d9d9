// bf16 in memory, fp32 in registers: sixteen values at a time.
#pragma once

#include <immintrin.h>

#include <cstdint>

using bf16 = uint16_t;

namespace a3 {

constexpr __mmask16 kAll = 0xffff;
constexpr __mmask32 kPair = 0xffffffff;

// The first `count` lanes, at most sixteen.
inline __mmask16 lanes(long count) { return count >= 16 ? kAll : (1 << count) - 1; }

// The same of twice as many.
inline __mmask32 pair_lanes(long count) { return count >= 32 ? kPair : (1u << count) - 1; }

inline __m512 widen(const bf16* from, __mmask16 some = kAll) {
  const __m256i narrow = _mm256_maskz_loadu_epi16(some, from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

inline void narrow(bf16* to, __m512 values, __mmask16 some = kAll) {
  _mm256_mask_storeu_epi16(to, some, (__m256i)_mm512_cvtneps_pbh(values));
}

// Both as bf16, `low` in the first sixteen lanes.
inline __m512i pack(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

}  // namespace a3
