// Attention of rows over the keys that each of them sees, with scores and sums in fp32.
//
// Keys and values are taken tile by tile, as in FlashAttention: a row's sums so far are scaled
// down when a tile shows it a much higher score. For many rows a tile is packed once into the order
// in which it is multiplied, word by word; for few rows packing would take longer than reading.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>

#include "tiles.h"

namespace a3 {
namespace {

// ---- few rows: keys and values as they lie, whole vectors of elements at a time ----

constexpr long kVector = 16 * kPerWord;     // elements
constexpr int kParts = kPerWord;            // vectors of fp32 that one of elements becomes
constexpr long kGroup = kColumns / kParts;  // vectors of elements whose sums stay in registers

// The words of `count` elements.
__mmask16 words_of(long count) { return lanes(count / kPerWord); }

// The sums of sixteen vectors, each over its values.
__m512 sums_of(__m512 (&x)[16]) {
  const auto add = [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); };
  __m512 y[8], z[4];
  for (int i = 0; i < 8; ++i)
    y[i] = add(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]),
               _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d left = _mm512_castps_pd(y[2 * i]), right = _mm512_castps_pd(y[2 * i + 1]);
    z[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(left, right)),
               _mm512_castpd_ps(_mm512_unpackhi_pd(left, right)));
  }
  const auto halve = [&](__m512 a, __m512 b) {
    return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return halve(halve(z[0], z[1]), halve(z[2], z[3]));
}

// scores[rows][kTile] += a[rows][columns] * keys[n][columns], with rows of a and of the keys `dim`
// apart and at most kGroup vectors of columns. Behind the last key it counts again. The `first`
// columns begin the scores, and ask for all of later keys: few rows wait for memory.
template <int G>
void score(int rows, const element* a, const element* keys, long n, long columns, long dim,
           bool first, float* scores) {
  const __mmask16 last = words_of(columns - (G - 1) * kVector);
  for (long i = 0; i < n; i += 16) {
    if (first) ask(keys + i * dim + kAhead, 16 * dim);
    for (int r = 0; r < rows; ++r) {
      __m512i row[G];
      for (int g = 0; g < G; ++g)
        row[g] = _mm512_maskz_loadu_epi32(g < G - 1 ? kAll : last, a + r * dim + g * kVector);
      __m512 sums[16];
      for (long k = 0; k < 16; ++k) {
        const element* const key = keys + std::min(i + k, n - 1) * dim;
        sums[k] = _mm512_setzero_ps();
        for (int g = 0; g < G; ++g)
          sums[k] = add_product(
              sums[k], row[g],
              _mm512_maskz_loadu_epi32(g < G - 1 ? kAll : last, key + g * kVector));
      }
      float* const to = scores + r * kTile + i;
      if (first)
        _mm512_storeu_ps(to, sums_of(sums));
      else
        add(to, sums_of(sums));
    }
  }
}

// sums[R][columns] += weights[R][kTile] * values[n][columns], with rows of sums and values `dim`
// apart. Weights after the last value are zero.
template <int R, int G>
void gather(const element* weights, const element* values, long n, long columns, long dim,
            bool first, float* sums) {
  const __mmask16 last = words_of(columns - (G - 1) * kVector);
  __m512 sum[R][G][kParts];
  for (auto& row : sum)
    for (auto& group : row)
      for (auto& part : group) part = _mm512_setzero_ps();
  for (long i = 0; i < n; i += kPerWord) {
    if (first) ask(values + i * dim + kAhead, kPerWord * dim);
    for (int g = 0; g < G; ++g) {
      __m512i some[kPerWord], words[kPerWord];
      for (long k = 0; k < kPerWord; ++k)
        some[k] = _mm512_maskz_loadu_epi32(g < G - 1 ? kAll : last,
                                           values + std::min(i + k, n - 1) * dim + g * kVector);
      pair(some, words);
      for (int r = 0; r < R; ++r) {
        word weight;
        std::memcpy(&weight, weights + r * kTile + i, sizeof weight);
        for (int part = 0; part < kParts; ++part)
          sum[r][g][part] = add_product(sum[r][g][part], words[part], _mm512_set1_epi32(weight));
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g) {
      unpair(sum[r][g]);
      for (int part = 0; part < kParts; ++part)
        if (const long d = g * kVector + part * 16; d < columns)
          add(sums + r * dim + d, sum[r][g][part]);
    }
}

template <int G>
constexpr decltype(&gather<1, G>) kGather[kRows] = {gather<1, G>, gather<2, G>, gather<3, G>,
                                                    gather<4, G>, gather<5, G>, gather<6, G>};

// Calls with the first column and the columns of every group, and how many vectors those are.
template <typename Use>
void by_groups(long columns, Use use) {
  for (long d = 0; d < columns; d += kGroup * kVector) {
    const long some = std::min(columns - d, kGroup * kVector);
    const long vectors = (some + kVector - 1) / kVector;
    if (vectors == 1) use(std::integral_constant<int, 1>{}, d, some);
    if (vectors == 2) use(std::integral_constant<int, 2>{}, d, some);
    if constexpr (kGroup > 2) {
      if (vectors == 3) use(std::integral_constant<int, 3>{}, d, some);
      if (vectors == 4) use(std::integral_constant<int, 4>{}, d, some);
    }
  }
}

// ---- softmax ----

constexpr float kHidden = -INFINITY;
constexpr float kLog2E = 1.44269504088896340736f;

// A row's scores count relative to the highest that it has seen, give or take eight powers of 2:
// its sums are hardly ever scaled then.
constexpr float kSlack = 8;

// One row of a tile: of its scores those from `first` to before `last` become weights. `total` are
// sixteen parts of the sum of its weights.
void weigh(float* scores, element* weights, long first, long last, float scale, float* highest,
           float* total, float* sums, long dim) {
  if (first > 0 || last < kTile) {
    std::fill(scores, scores + first, kHidden);
    std::fill(scores + last, scores + kTile, kHidden);
  }
  __m512 most = _mm512_loadu_ps(scores);
  for (long j = 16; j < kTile; j += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + j));
  const __m512 limit = _mm512_set1_ps(*highest + kSlack / scale);
  if (_mm512_cmp_ps_mask(most, limit, _CMP_GT_OQ)) {
    const float now = _mm512_reduce_max_ps(most);
    const __m512 shrunk = _mm512_set1_ps(std::exp2((*highest - now) * scale));
    *highest = now;
    _mm512_storeu_ps(total, _mm512_mul_ps(_mm512_loadu_ps(total), shrunk));
    for (long d = 0; d < dim; d += 16)
      _mm512_storeu_ps(sums + d, _mm512_mul_ps(_mm512_loadu_ps(sums + d), shrunk));
  }
  const __m512 offset = _mm512_set1_ps(-*highest * scale), factor = _mm512_set1_ps(scale);
  __m512 sum = _mm512_loadu_ps(total);
  for (long j = 0; j < kTile; j += 16) {
    const __m512 weight = exp2(_mm512_fmadd_ps(_mm512_loadu_ps(scores + j), factor, offset));
    sum = _mm512_add_ps(sum, weight);
    narrow(weights + j, weight);
  }
  _mm512_storeu_ps(total, sum);
}

}  // namespace
}  // namespace a3

// Rows of several sequences, each over its own sequence's keys.
//
// query, output  [sequences][heads][rows][dim], by the strides of sequence, head and row;
//                dim is a multiple of 16
// keys, values   of each sequence, [kv_heads][n][dim], heads `stride[sequence]` apart
// first, last    [sequences][rows]: a row sees the keys from first to before last, at least one
// shared_...     where n_shared > 0, keys and values [kv_heads][n_shared][dim] of each sequence,
//                gathered; of these a row sees the first counts[sequence][row] too
// sinks          of each head a score whose weight goes nowhere; may be null
// block          rows that a task takes, with all heads that share its keys
// splits         parts that a task's keys are cut into, where there are few tasks
// parts          room for all tasks' sums: group * min(block, rows) * (dim + 17) for each part
extern "C" void a3_attend(const element* query, const long* query_strides,
                          const element* const* keys, const element* const* values,
                          const long* stride, const int64_t* first, const int64_t* last,
                          const element* const* shared_keys, const element* const* shared_values,
                          const int64_t* counts, long n_shared, long sequences, long heads,
                          long kv_heads, long rows, long dim, float scaling,
                          const float* sinks, long block, long splits, long threads, float* parts, element* output,
                          const long* output_strides) {
  using namespace a3;
  const long group = heads / kv_heads, blocks = (rows + block - 1) / block;
  const long most = group * std::min(block, rows), wholes = sequences * kv_heads * blocks;
  const long part = most * (dim + 16 + 1);  // sums, totals and highest scores of a part
  const float scale = scaling * kLog2E;  // powers of 2 instead of e

  struct Whole {
    long sequence, head, row, count;
  };
  const auto whole_at = [&](long index) -> Whole {
    // The last rows see most keys: they begin.
    const long row = (blocks - 1 - index / kv_heads % blocks) * block;
    return {index / kv_heads / blocks, index % kv_heads, row, std::min(block, rows - row)};
  };
  const auto offset = [&](const long* strides, const Whole& whole, long i) {
    return whole.sequence * strides[0] + (whole.head * group + i / whole.count) * strides[1] +
           (whole.row + i % whole.count) * strides[2];
  };

#pragma omp parallel num_threads(threads)
  {
    const long words = kTile * dim / kPerWord;
    std::unique_ptr<word[]> packed_keys(new word[words]), packed_values(new word[words]);
    std::unique_ptr<element[]> left(new element[most * dim]);
    std::unique_ptr<int64_t[]> starts(new int64_t[most]), stops(new int64_t[most]);
    alignas(64) float scores[kRows * kTile];
    alignas(64) element weights[kRows * kTile];

#pragma omp for schedule(dynamic)
    for (long task = 0; task < wholes * splits; ++task) {
      const Whole whole = whole_at(task / splits);
      const long n = group * whole.count, split = task % splits;
      for (long i = 0; i < n; ++i) {
        const long row = whole.sequence * rows + whole.row + i % whole.count;
        starts[i] = first[row], stops[i] = last[row];
        std::memcpy(left.get() + i * dim, query + offset(query_strides, whole, i),
                    dim * sizeof(element));
      }
      float* const sums = parts + task * part;
      float *const totals = sums + most * dim, *const highest = totals + most * 16;
      std::fill_n(sums, n * dim, 0.f);
      std::fill_n(totals, n * 16, 0.f);
      std::fill_n(highest, n, kHidden);

      const bool few = n <= kRows;
      // Row i sees the keys from starts[i] to before stops[i] of this head's.
      const auto attend = [&](const element* head_keys, const element* head_values) {
        const int64_t begin = *std::min_element(starts.get(), starts.get() + n);
        const int64_t end = *std::max_element(stops.get(), stops.get() + n);
        const long tiles = (end - begin + kTile - 1) / kTile;
        for (long tile = split * tiles / splits; tile < (split + 1) * tiles / splits; ++tile) {
          const int64_t from = begin + tile * kTile, here = std::min<int64_t>(kTile, end - from);
          const element *const some_keys = head_keys + from * dim,
                     *const some_values = head_values + from * dim;
          bool packed = false;
          for (long i = 0; i < n; i += kRows) {
            const int count = std::min<long>(kRows, n - i);
            if (*std::max_element(stops.get() + i, stops.get() + i + count) <= from ||
                *std::min_element(starts.get() + i, starts.get() + i + count) >= from + here)
              continue;
            if (!few && !packed) {
              pack_keys(some_keys, here, dim, packed_keys.get());
              pack_values(some_values, here, dim, packed_values.get());
              packed = true;
            }
            if (few)
              by_groups(dim, [&](auto vectors, long d, long columns) {
                score<vectors()>(count, left.get() + d, some_keys + d, here, columns, dim, d == 0,
                                 scores);
              });
            else
              product<false>(count, kTile, left.get() + i * dim, dim, packed_keys.get(), kTile,
                             dim / kPerWord, scores, kTile);
            for (int r = 0; r < count; ++r) {
              const int64_t seen = std::clamp<int64_t>(starts[i + r] - from, 0, here);
              const int64_t unseen = std::clamp<int64_t>(stops[i + r] - from, 0, here);
              float* const row = scores + r * kTile;
              if (seen >= unseen) {
                std::fill_n(weights + r * kTile, kTile, 0);
                continue;
              }
              weigh(row, weights + r * kTile, seen, unseen, scale, highest + i + r,
                    totals + (i + r) * 16, sums + (i + r) * dim, dim);
            }
            if (few)
              by_groups(dim, [&](auto vectors, long d, long columns) {
                kGather<vectors()>[count - 1](weights, some_values + d, here, columns, dim,
                                              d == 0, sums + d);
              });
            else
              product<true>(count, dim, weights, kTile, packed_values.get(), dim, kTile / kPerWord,
                            sums + i * dim, dim);
          }
        }
      };
      const long own = whole.head * stride[whole.sequence];
      attend(keys[whole.sequence] + own, values[whole.sequence] + own);
      if (n_shared > 0) {
        const long gathered = whole.head * n_shared * dim;
        for (long i = 0; i < n; ++i) {
          starts[i] = 0;
          stops[i] = counts[whole.sequence * rows + whole.row + i % whole.count];
        }
        attend(shared_keys[whole.sequence] + gathered, shared_values[whole.sequence] + gathered);
      }
    }

#pragma omp for schedule(static)
    for (long index = 0; index < wholes; ++index) {
      const Whole whole = whole_at(index);
      const float* const sums = parts + index * splits * part;
      for (long i = 0; i < group * whole.count; ++i) {
        const float *const totals = sums + most * dim + i * 16,
                    *const highest = sums + most * (dim + 16) + i;
        const float sink =
            sinks ? sinks[whole.head * group + i / whole.count] * kLog2E / scale : kHidden;
        float top = sink;
        for (long s = 0; s < splits; ++s) top = std::max(top, highest[s * part]);
        float total = std::exp2((sink - top) * scale);
        for (long s = 0; s < splits; ++s)
          total += _mm512_reduce_add_ps(_mm512_loadu_ps(totals + s * part)) *
                   std::exp2((highest[s * part] - top) * scale);
        element* const to = output + offset(output_strides, whole, i);
        for (long d = 0; d < dim; d += 16) {
          __m512 sum = _mm512_setzero_ps();
          for (long s = 0; s < splits; ++s) {
            const float share = std::exp2((highest[s * part] - top) * scale) / total;
            sum = _mm512_fmadd_ps(_mm512_loadu_ps(sums + s * part + i * dim + d),
                                  _mm512_set1_ps(share), sum);
          }
          narrow(to + d, sum);
        }
      }
    }
  }
}
