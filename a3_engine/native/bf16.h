// bf16 in memory, fp32 in registers: sixteen values at a time.
#pragma once

#include <immintrin.h>

#include <cstdint>

using bf16 = uint16_t;

namespace a3 {

constexpr __mmask16 kAll = 0xffff;

// The first `count` lanes, at most sixteen.
inline __mmask16 lanes(long count) { return count >= 16 ? kAll : (1 << count) - 1; }

inline __m512 widen(const bf16* from, __mmask16 some = kAll) {
  const __m256i narrow = _mm256_maskz_loadu_epi16(some, from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

inline void narrow(bf16* to, __m512 values, __mmask16 some = kAll) {
  _mm256_mask_storeu_epi16(to, some, (__m256i)_mm512_cvtneps_pbh(values));
}

}  // namespace a3
