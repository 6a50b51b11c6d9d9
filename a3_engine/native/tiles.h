// Products of some rows with a tile, which is packed once into the order in which it is multiplied,
// word by word; and powers of 2.
#pragma once

#include <algorithm>
#include <cstring>
#include <iterator>

#include "element.h"

namespace a3 {
namespace {

constexpr long kTile = 128;  // keys; TILE in Python
constexpr int kRows = 6;     // by 4 vectors of columns: 24 accumulators of 32 registers
constexpr int kColumns = 4;

// A tile's sum, made by itself: thousands of small terms would round against a large one.
void add(float* to, __m512 sum) { _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum)); }

// Sixteen rows of sixteen 32-bit values become sixteen columns.
void transpose(__m512i (&x)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    x[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    x[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
  }
}

// keys[n][dim] as packed[words of dim][kTile]; what the tile lacks becomes zero. The next tile's
// rows are asked for: they come while this one is multiplied.
void pack_keys(const element* keys, long n, long dim, word* packed) {
  const long words = dim / kPerWord;
  for (long at = 0; at < kTile; at += 16) {
    ask(keys + (kTile + at) * dim, 16 * dim);
    for (long w = 0; w < words; w += 16) {
      const __mmask16 some = lanes(words - w);
      __m512i x[16];
      for (int i = 0; i < 16; ++i)
        x[i] = at + i < n ? _mm512_maskz_loadu_epi32(some, keys + (at + i) * dim + w * kPerWord)
                          : _mm512_setzero_si512();
      transpose(x);
      for (int i = 0; i < 16 && w + i < words; ++i)
        _mm512_storeu_si512(packed + (w + i) * kTile + at, x[i]);
    }
  }
}

// values[n][dim] as packed[words of kTile][dim], likewise.
void pack_values(const element* values, long n, long dim, word* packed) {
  for (long at = 0; at < kTile; at += kPerWord) {
    ask(values + (kTile + at) * dim, kPerWord * dim);
    for (long d = 0; d < dim; d += 16) {
      __m512 rows[kPerWord];
      for (long i = 0; i < kPerWord; ++i)
        rows[i] = widen(values + (at + i) * dim + d, at + i < n ? kAll : 0);
      _mm512_storeu_si512(packed + at / kPerWord * dim + d, zip(rows));
    }
  }
}

// c[R][16 C] = a[R][words] * b[words][ldb], or with `onto` added to what is there.
template <int R, int C, bool onto>
void multiply(const element* a, long lda, const word* b, long ldb, long words, float* c, long ldc) {
  __m512 sums[R][C];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm512_setzero_ps();
  for (long w = 0; w < words; ++w) {
    __m512i right[C];
    for (int j = 0; j < C; ++j) right[j] = _mm512_loadu_si512(b + w * ldb + 16 * j);
    for (int r = 0; r < R; ++r) {
      word one;
      std::memcpy(&one, a + r * lda + w * kPerWord, sizeof one);
      const __m512i left = _mm512_set1_epi32(one);
      for (int j = 0; j < C; ++j) sums[r][j] = add_product(sums[r][j], left, right[j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j)
      if (onto)
        add(c + r * ldc + 16 * j, sums[r][j]);
      else
        _mm512_storeu_ps(c + r * ldc + 16 * j, sums[r][j]);
}

// The loop above for every number of rows and columns.
using Multiply = decltype(&multiply<1, 1, false>);
template <int R, bool onto>
constexpr Multiply kOfRows[kColumns] = {multiply<R, 1, onto>, multiply<R, 2, onto>,
                                        multiply<R, 3, onto>, multiply<R, 4, onto>};
template <bool onto>
constexpr const Multiply* kMultiply[kRows] = {kOfRows<1, onto>, kOfRows<2, onto>, kOfRows<3, onto>,
                                              kOfRows<4, onto>, kOfRows<5, onto>, kOfRows<6, onto>};

// The same of up to kRows rows and any multiple of 16 columns.
template <bool onto>
void product(int rows, long columns, const element* a, long lda, const word* b, long ldb,
             long words, float* c, long ldc) {
  for (long d = 0; d < columns; d += 16 * kColumns) {
    const long wide = std::min<long>(kColumns, (columns - d) / 16);
    kMultiply<onto>[rows - 1][wide - 1](a, lda, b + d, ldb, words, c + d, ldc);
  }
}

// Taylor's coefficients for 2^x, the last one first; of the shorter row that one is fitted. The
// relative error on [-0.5, 0.5] is 2e-7 for fp32, and below 1e-5 for bf16, whose own is 4e-3.
#ifdef A3_FP32
constexpr float kPowers[] = {1.540353e-4f, 1.3333558e-3f, 9.618129e-3f, 5.5504109e-2f,
                             2.4022651e-1f, 6.9314718e-1f, 1.0f};
#else
constexpr float kPowers[] = {9.570e-3f, 5.5917e-2f, 2.402265e-1f, 6.931472e-1f, 1.0f};
#endif

// 2^x for x <= 8, and zero below the smallest normal number.
__m512 exp2(__m512 x) {
  // Added to so large a number, x is rounded to a whole one, which the lowest bits are then.
  const __m512 large = _mm512_set1_ps(12582912.f);
  const __m512 rounded = _mm512_add_ps(x, large);
  const __m512 part = _mm512_sub_ps(x, _mm512_sub_ps(rounded, large));
  __m512 sum = _mm512_set1_ps(kPowers[0]);
  for (size_t i = 1; i < std::size(kPowers); ++i)
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(kPowers[i]));
  const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(rounded), 23);
  return _mm512_castsi512_ps(
      _mm512_maskz_add_epi32(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-126), _CMP_GE_OQ),
                             _mm512_castps_si512(sum), power));
}

}  // namespace
}  // namespace a3
