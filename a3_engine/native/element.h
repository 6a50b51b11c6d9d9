// Elements in memory, fp32 in registers: sixteen values at a time. Compiled for fp32 with A3_FP32,
// else for bf16, which CPUs without AVX512-BF16 compute by their ordinary instructions.
#pragma once

#include <immintrin.h>

#include <cstdint>

#ifdef A3_FP32
using element = float;
#else
using element = uint16_t;  // bf16
#endif
using word = int32_t;  // as it is multiplied: one fp32 value, or two of bf16

namespace a3 {

constexpr long kPerWord = sizeof(word) / sizeof(element);
constexpr __mmask16 kAll = 0xffff;

// The first `count` lanes of sixteen, none below one; bytes of 64.
inline __mmask16 lanes(long count) {
  return count >= 16 ? kAll : count > 0 ? (1 << count) - 1 : 0;
}
inline __mmask64 bytes(long count) {
  return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
}

// What loops will read next is asked for so far ahead, across pages too, where the processor stops
// looking ahead by itself.
constexpr long kAhead = 4096 / sizeof(element);

inline void ask(const element* from, long count) {
  for (long at = 0; at < count; at += 64 / static_cast<long>(sizeof(element)))
    _mm_prefetch(from + at, _MM_HINT_T0);
}

// widen:        elements as fp32.
// narrow:       fp32 as elements.
// zip:          fp32 as words, each of one value of every part.
// join:         fp32 as elements, those of the first part first.
// pair:         elements of rows that lie side by side, 16 columns a part, as words of each column,
//               in an order that `unpair` undoes for what was made of them.
// add_product:  sums + left * right; a word of two values adds both products.
#ifdef A3_FP32

inline __m512 widen(const element* from, __mmask16 some = kAll) {
  return _mm512_maskz_loadu_ps(some, from);
}
inline void narrow(element* to, __m512 values) { _mm512_storeu_ps(to, values); }
inline __m512i zip(const __m512 (&parts)[1]) { return _mm512_castps_si512(parts[0]); }
inline __m512i join(const __m512 (&parts)[1]) { return _mm512_castps_si512(parts[0]); }
inline void pair(const __m512i (&rows)[1], __m512i (&words)[1]) { words[0] = rows[0]; }
inline void unpair(__m512 (&)[1]) {}
inline __m512 add_product(__m512 sums, __m512i left, __m512i right) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), sums);
}

#else

inline __m512 widen(const element* from, __mmask16 some = kAll) {
  const __m256i narrow = _mm256_maskz_loadu_epi16(some, from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}
inline __m512i zip(const __m512 (&parts)[2]) {
  return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(parts[0]), 16),
                         _mm512_castps_si512(parts[1]));
}

inline void pair(const __m512i (&rows)[2], __m512i (&words)[2]) {
  words[0] = _mm512_unpacklo_epi16(rows[0], rows[1]);
  words[1] = _mm512_unpackhi_epi16(rows[0], rows[1]);
}
inline void unpair(__m512 (&parts)[2]) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second =
      _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  const __m512 low = _mm512_permutex2var_ps(parts[0], first, parts[1]);
  parts[1] = _mm512_permutex2var_ps(parts[0], second, parts[1]);
  parts[0] = low;
}

#ifdef __AVX512BF16__

inline void narrow(element* to, __m512 values) {
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(values));
}
inline __m512i join(const __m512 (&parts)[2]) {
  return (__m512i)_mm512_cvtne2ps_pbh(parts[1], parts[0]);
}
inline __m512 add_product(__m512 sums, __m512i left, __m512i right) {
  return _mm512_dpbf16_ps(sums, (__m512bh)left, (__m512bh)right);
}

#else

inline __m256i rounded(__m512 values) {  // to the nearest, ties to even
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
}
inline void narrow(element* to, __m512 values) {
  _mm256_storeu_si256((__m256i*)to, rounded(values));
}
inline __m512i join(const __m512 (&parts)[2]) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(rounded(parts[0])), rounded(parts[1]), 1);
}
inline __m512 add_product(__m512 sums, __m512i left, __m512i right) {
  const auto first = [](__m512i both) { return _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)); };
  const auto second = [](__m512i both) {
    return _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-65536)));
  };
  return _mm512_fmadd_ps(second(left), second(right),
                         _mm512_fmadd_ps(first(left), first(right), sums));
}

#endif
#endif

}  // namespace a3
