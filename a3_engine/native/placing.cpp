// Stored chunks into a cache, read once: their keys are turned on the way.

#include "bf16.h"

namespace {

// A cache is larger than what a processor keeps at hand: written past it, memory is not read first.
void put(bf16* to, __m512i values, __mmask32 some) {
  if (some == a3::kPair && reinterpret_cast<uintptr_t>(to) % sizeof(values) == 0)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), values);
  else
    _mm512_mask_storeu_epi16(to, some, values);
}

void copy(const bf16* from, long count, bf16* to) {
  for (long at = 0; at < count; at += 32) {
    const __mmask32 some = a3::pair_lanes(count - at);
    put(to + at, _mm512_maskz_loadu_epi16(some, from + at), some);
  }
}

void turn(const bf16* key, const float* cosine, const float* sine, long half, bf16* to) {
  for (long at = 0; at < half; at += 32) {
    const __mmask32 some = a3::pair_lanes(half - at);
    __m512 first[2], second[2];
    for (long part = 0; part < 2; ++part) {
      const long d = at + 16 * part;
      const __mmask16 mask = some >> 16 * part;
      const __m512 c = _mm512_maskz_loadu_ps(mask, cosine + d);
      const __m512 s = _mm512_maskz_loadu_ps(mask, sine + d);
      const __m512 one = a3::widen(key + d, mask), other = a3::widen(key + half + d, mask);
      first[part] = _mm512_fnmadd_ps(other, s, _mm512_mul_ps(one, c));
      second[part] = _mm512_fmadd_ps(one, s, _mm512_mul_ps(other, c));
    }
    put(to + at, a3::pack(first[0], first[1]), some);
    put(to + half + at, a3::pack(second[0], second[1]), some);
  }
}

}  // namespace

// keys, values        of each chunk, bf16 [layers][heads][tokens][dim]
// start, tokens       of each chunk
// to_keys, to_values  the cache's layers, from position 0 on; heads `stride[layer]` apart
// cosines, sines      fp32 [positions][half] of each layer
extern "C" void a3_place(const bf16* const* keys, const bf16* const* values, const long* start,
                         const long* tokens, long chunks, bf16* const* to_keys,
                         bf16* const* to_values, const long* stride, const float* const* cosines,
                         const float* const* sines, long layers, long heads, long dim, long half,
                         long threads) {
#pragma omp parallel num_threads(threads)
  {
#pragma omp for collapse(3) schedule(dynamic, 4) nowait
    for (long chunk = 0; chunk < chunks; ++chunk)
      for (long layer = 0; layer < layers; ++layer)
        for (long head = 0; head < heads; ++head) {
          const long n = tokens[chunk], from = (layer * heads + head) * n * dim;
          const long to = head * stride[layer] + start[chunk] * dim;
          copy(values[chunk] + from, n * dim, to_values[layer] + to);
          for (long token = 0; token < n; ++token) {
            const bf16* key = keys[chunk] + from + token * dim;
            bf16* turned = to_keys[layer] + to + token * dim;
            const long angle = (start[chunk] + token) * half;
            turn(key, cosines[layer] + angle, sines[layer] + angle, half, turned);
            copy(key + 2 * half, dim - 2 * half, turned + 2 * half);
          }
        }
    _mm_sfence();  // streamed stores obey no other order
  }
}
