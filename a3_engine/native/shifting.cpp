// All tokens of a layer follow the moves of a few, the probes, whose values are like theirs.

#include <cmath>
#include <memory>

#include "tiles.h"

namespace a3 {
namespace {

// Squares of one token's values, sixteen parts of their sum.
__m512 squares(const element* values, long dim, __m512 sum) {
  ask(values + kAhead, dim);
  for (long d = 0; d < dim; d += 16) {
    const __m512 some = widen(values + d);
    sum = _mm512_fmadd_ps(some, some, sum);
  }
  return sum;
}

// Scores of all probes become weights that add up to `share`; those of none are zero.
void weigh(float* scores, element* weights, long n_probes, long columns, float factor,
           float share) {
  std::fill(scores + n_probes, scores + columns, -INFINITY);
  __m512 most = _mm512_loadu_ps(scores);
  for (long j = 16; j < columns; j += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + j));
  const __m512 scale = _mm512_set1_ps(factor),
               offset = _mm512_set1_ps(-_mm512_reduce_max_ps(most) * factor);
  __m512 sum = _mm512_setzero_ps();
  for (long j = 0; j < columns; j += 16) {
    const __m512 weight = exp2(_mm512_fmadd_ps(_mm512_loadu_ps(scores + j), scale, offset));
    sum = _mm512_add_ps(sum, weight);
    _mm512_storeu_ps(scores + j, weight);
  }
  const __m512 part = _mm512_set1_ps(share / _mm512_reduce_add_ps(sum));
  for (long j = 0; j < columns; j += 16)
    narrow(weights + j, _mm512_mul_ps(_mm512_loadu_ps(scores + j), part));
}

void move(element* to, __m512 by) { narrow(to, _mm512_add_ps(widen(to), by)); }

}  // namespace
}  // namespace a3

// keys, values      [heads][tokens][dim], heads by their strides apart; moved in place
// share             [tokens]: of the mean move of the probes that is followed
// probes            [heads][n_probes][dim], of length one over all heads; at most kTile
// ..._moves         [heads][n_probes][dim], those of keys without position
// cosines, sines    [tokens][half]; half is a multiple of 16, 2 half <= dim
// factor            of the scores, by which the powers of 2 are taken
// packed            room for [3][heads][kTile][dim]
extern "C" void a3_shift(element* keys, long key_stride, element* values, long value_stride,
                         const float* share, const element* probes, const element* key_moves,
                         const element* value_moves, const float* cosines, const float* sines,
                         long tokens, long heads, long dim, long half, long n_probes, float factor,
                         word* packed, long threads) {
  using namespace a3;
  const long words = kTile * dim / kPerWord, blocks = (tokens + kRows - 1) / kRows;
  const long columns = (n_probes + 15) / 16 * 16;
  word *const packed_probes = packed, *const packed_keys = packed + heads * words,
              *const packed_values = packed_keys + heads * words;
#pragma omp parallel num_threads(threads)
  {
    std::unique_ptr<float[]> moves(new float[kRows * dim]);
    alignas(64) float scores[kRows * kTile];
    alignas(64) element weights[kRows * kTile];

#pragma omp for schedule(static)
    for (long head = 0; head < heads; ++head) {
      const long from = head * n_probes * dim;
      pack_keys(probes + from, n_probes, dim, packed_probes + head * words);
      pack_values(key_moves + from, n_probes, dim, packed_keys + head * words);
      pack_values(value_moves + from, n_probes, dim, packed_values + head * words);
    }
#pragma omp for schedule(static)
    for (long block = 0; block < blocks; ++block) {
      const long token = block * kRows;
      const int count = std::min<long>(kRows, tokens - token);
      __m512 lengths[kRows] = {};
      std::fill_n(scores, count * kTile, 0.f);
      for (long head = 0; head < heads; ++head) {
        const element* const some = values + head * value_stride + token * dim;
        product<true>(count, columns, some, dim, packed_probes + head * words, kTile,
                      dim / kPerWord, scores, kTile);
        for (int r = 0; r < count; ++r) lengths[r] = squares(some + r * dim, dim, lengths[r]);
      }
      for (int r = 0; r < count; ++r) {
        const float length = std::max(std::sqrt(_mm512_reduce_add_ps(lengths[r])), 1e-12f);
        weigh(scores + r * kTile, weights + r * kTile, n_probes, columns, factor / length,
              share[token + r]);
      }
      for (long head = 0; head < heads; ++head) {
        product<false>(count, dim, weights, kTile, packed_values + head * words, dim,
                       columns / kPerWord, moves.get(), dim);
        for (int r = 0; r < count; ++r)
          for (long d = 0; d < dim; d += 16)
            move(values + head * value_stride + (token + r) * dim + d,
                 _mm512_loadu_ps(moves.get() + r * dim + d));
        product<false>(count, dim, weights, kTile, packed_keys + head * words, dim,
                       columns / kPerWord, moves.get(), dim);
        for (int r = 0; r < count; ++r) {
          element* const key = keys + head * key_stride + (token + r) * dim;
          const float* const by = moves.get() + r * dim;
          ask(key + kAhead, dim);
          for (long d = 0; d < half; d += 16) {  // turned to where the token stands
            const __m512 c = _mm512_loadu_ps(cosines + (token + r) * half + d);
            const __m512 s = _mm512_loadu_ps(sines + (token + r) * half + d);
            const __m512 one = _mm512_loadu_ps(by + d), other = _mm512_loadu_ps(by + half + d);
            move(key + d, _mm512_fnmadd_ps(other, s, _mm512_mul_ps(one, c)));
            move(key + half + d, _mm512_fmadd_ps(one, s, _mm512_mul_ps(other, c)));
          }
          for (long d = 2 * half; d < dim; d += 16) move(key + d, _mm512_loadu_ps(by + d));
        }
      }
    }
  }
}
