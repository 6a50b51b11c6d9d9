// Stored chunks into a cache, read once: their keys are turned on the way.

#include <algorithm>
#include <cstring>

#include "bf16.h"

// keys, values        of each chunk, bf16 [layers][heads][tokens][dim]
// start, tokens       of each chunk
// to_keys, to_values  the cache's layers, from position 0 on; heads `stride[layer]` apart
// cosines, sines      fp32 [positions][half] of each layer
extern "C" void a3_place(const bf16* const* keys, const bf16* const* values, const long* start,
                         const long* tokens, long chunks, bf16* const* to_keys,
                         bf16* const* to_values, const long* stride, const float* const* cosines,
                         const float* const* sines, long layers, long heads, long dim, long half,
                         long threads) {
#pragma omp parallel for collapse(3) num_threads(threads) schedule(dynamic, 4)
  for (long chunk = 0; chunk < chunks; ++chunk)
    for (long layer = 0; layer < layers; ++layer)
      for (long head = 0; head < heads; ++head) {
        const long n = tokens[chunk], from = (layer * heads + head) * n * dim;
        const long to = head * stride[layer] + start[chunk] * dim;
        std::memcpy(to_values[layer] + to, values[chunk] + from, n * dim * sizeof(bf16));
        for (long token = 0; token < n; ++token) {
          const bf16* key = keys[chunk] + from + token * dim;
          bf16* turned = to_keys[layer] + to + token * dim;
          const float* cosine = cosines[layer] + (start[chunk] + token) * half;
          const float* sine = sines[layer] + (start[chunk] + token) * half;
          for (long d = 0; d < half; d += 16) {
            const __mmask16 some = a3::lanes(half - d);
            const __m512 c = _mm512_maskz_loadu_ps(some, cosine + d);
            const __m512 s = _mm512_maskz_loadu_ps(some, sine + d);
            const __m512 first = a3::widen(key + d, some);
            const __m512 second = a3::widen(key + half + d, some);
            a3::narrow(turned + d, _mm512_fnmadd_ps(second, s, _mm512_mul_ps(first, c)), some);
            a3::narrow(turned + half + d, _mm512_fmadd_ps(first, s, _mm512_mul_ps(second, c)),
                       some);
          }
          std::copy(key + 2 * half, key + dim, turned + 2 * half);
        }
      }
}
