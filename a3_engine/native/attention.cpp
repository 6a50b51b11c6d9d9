// Attention of rows over the keys that each of them sees, with scores and sums in fp32.
//
// Keys and values are taken tile by tile, as in FlashAttention: a row's sums so far are scaled
// down whenever a tile shows it a higher score. For many rows a tile is packed once into the order
// in which it is multiplied, word by word; for few rows packing would take longer than reading.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "tiles.h"

namespace a3 {
namespace {

// ---- few rows: keys and values as they lie ----

constexpr long kAhead = 2048;  // bytes

// Few rows wait for memory: what comes next is asked for ahead, across pages too.
__m512 read(const element* from) {
  _mm_prefetch(reinterpret_cast<const char*>(from) + kAhead, _MM_HINT_T0);
  return widen(from);
}

// scores[R][kTile] += a[R][16 C] * keys[n][16 C], with rows of a and of the keys `dim` apart.
template <int R, int C>
void score(const element* a, const element* keys, long n, long dim, float* scores) {
  __m512 rows[R][C];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) rows[r][j] = widen(a + r * dim + 16 * j);
  for (long i = 0; i < n; ++i) {
    __m512 key[C];
    for (int j = 0; j < C; ++j) key[j] = read(keys + i * dim + 16 * j);
    for (int r = 0; r < R; ++r) {
      __m512 sum = _mm512_mul_ps(rows[r][0], key[0]);
      for (int j = 1; j < C; ++j) sum = _mm512_fmadd_ps(rows[r][j], key[j], sum);
      scores[r * kTile + i] += _mm512_reduce_add_ps(sum);
    }
  }
}

// sums[R][16 C] += weights[R][kTile] * values[n][16 C], with rows of sums and values `dim` apart.
template <int R, int C>
void gather(const float* weights, const element* values, long n, long dim, float* sums) {
  __m512 sum[R][C];
  for (auto& row : sum)
    for (auto& one : row) one = _mm512_setzero_ps();
  for (long i = 0; i < n; ++i)
    for (int j = 0; j < C; ++j) {
      const __m512 value = read(values + i * dim + 16 * j);
      for (int r = 0; r < R; ++r)
        sum[r][j] = _mm512_fmadd_ps(_mm512_set1_ps(weights[r * kTile + i]), value, sum[r][j]);
    }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) add(sums + r * dim + 16 * j, sum[r][j]);
}

// ---- the loops above for every number of rows and columns ----

struct Loops {
  decltype(&score<1, 1>) score;
  decltype(&gather<1, 1>) gather;
};
template <int R, int C>
constexpr Loops kLoops = {score<R, C>, gather<R, C>};
template <int R>
constexpr Loops kOfRows[kColumns] = {kLoops<R, 1>, kLoops<R, 2>, kLoops<R, 3>, kLoops<R, 4>};
constexpr const Loops* kOf[kRows] = {kOfRows<1>, kOfRows<2>, kOfRows<3>,
                                     kOfRows<4>, kOfRows<5>, kOfRows<6>};

// Calls with the loops and the first column of each group of columns.
template <typename Use>
void by_columns(int rows, long columns, Use use) {
  for (long d = 0; d < columns; d += 16 * kColumns)
    use(kOf[rows - 1][std::min<long>(kColumns, (columns - d) / 16) - 1], d);
}

// ---- softmax ----

constexpr float kHidden = -INFINITY;

// A row's scores count relative to the highest that it has seen, give or take eight powers of 2:
// its sums are hardly ever scaled then.
constexpr float kSlack = 8;

// One row of a tile: of its scores those from `first` to before `last` become weights, as elements
// and where there are few rows in fp32. `total` are sixteen parts of the sum of its weights.
template <bool few>
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
    if (few)
      _mm512_storeu_ps(scores + j, weight);
    else
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
// block          rows that a task takes, with all heads that share its keys
// splits         parts that a task's keys are cut into, where there are few tasks
// parts          room for all tasks' sums: group * min(block, rows) * (dim + 17) for each part
extern "C" void a3_attend(const element* query, const long* query_strides,
                          const element* const* keys, const element* const* values,
                          const long* stride, const int64_t* first, const int64_t* last,
                          const element* const* shared_keys, const element* const* shared_values,
                          const int64_t* counts, long n_shared, long sequences, long heads,
                          long kv_heads, long rows, long dim, float scaling, long block,
                          long splits, long threads, float* parts, element* output,
                          const long* output_strides) {
  using namespace a3;
  const long group = heads / kv_heads, blocks = (rows + block - 1) / block;
  const long most = group * std::min(block, rows), wholes = sequences * kv_heads * blocks;
  const long part = most * (dim + 16 + 1);  // sums, totals and highest scores of a part
  const float scale = scaling * 1.44269504088896340736f;  // powers of 2 instead of e

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
            if (few) {
              std::fill_n(scores, count * kTile, 0.f);
              by_columns(count, dim, [&](const Loops& loops, long d) {
                loops.score(left.get() + d, some_keys + d, here, dim, scores);
              });
            } else {
              product<false>(count, kTile, left.get() + i * dim, dim, packed_keys.get(), kTile,
                             dim / kPerWord, scores, kTile);
            }
            for (int r = 0; r < count; ++r) {
              const int64_t seen = std::clamp<int64_t>(starts[i + r] - from, 0, here);
              const int64_t unseen = std::clamp<int64_t>(stops[i + r] - from, 0, here);
              float* const row = scores + r * kTile;
              if (seen >= unseen) {
                std::fill_n(row, kTile, 0.f);
                std::fill_n(weights + r * kTile, kTile, 0);
                continue;
              }
              (few ? weigh<true> : weigh<false>)(row, weights + r * kTile, seen, unseen, scale,
                                                 highest + i + r, totals + (i + r) * 16,
                                                 sums + (i + r) * dim, dim);
            }
            if (few)
              by_columns(count, dim, [&](const Loops& loops, long d) {
                loops.gather(scores, some_values + d, here, dim, sums + d);
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
        float top = kHidden, total = 0;
        for (long s = 0; s < splits; ++s) top = std::max(top, highest[s * part]);
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
