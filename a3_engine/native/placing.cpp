// Stored chunks into a cache, read once: their keys are turned on the way.

#include "element.h"

namespace {

constexpr long kVector = sizeof(__m512i) / sizeof(element);
constexpr int kParts = kVector / 16;

__mmask64 bytes(long count) {
  return count >= kVector ? ~__mmask64{0} : (__mmask64{1} << count * sizeof(element)) - 1;
}

// A cache is larger than what a processor keeps at hand: written past it, memory is not read first.
void put(element* to, __m512i values, long count) {
  if (count >= kVector && reinterpret_cast<uintptr_t>(to) % sizeof(values) == 0)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), values);
  else
    _mm512_mask_storeu_epi8(to, bytes(count), values);
}

void copy(const element* from, long count, element* to) {
  for (long at = 0; at < count; at += kVector)
    put(to + at, _mm512_maskz_loadu_epi8(bytes(count - at), from + at), count - at);
}

void turn(const element* key, const float* cosine, const float* sine, long half, element* to) {
  for (long at = 0; at < half; at += kVector) {
    __m512 first[kParts], second[kParts];
    for (int part = 0; part < kParts; ++part) {
      const long d = at + 16 * part;
      const __mmask16 some = d < half ? a3::lanes(half - d) : 0;
      const __m512 c = _mm512_maskz_loadu_ps(some, cosine + d);
      const __m512 s = _mm512_maskz_loadu_ps(some, sine + d);
      const __m512 one = a3::widen(key + d, some), other = a3::widen(key + half + d, some);
      first[part] = _mm512_fnmadd_ps(other, s, _mm512_mul_ps(one, c));
      second[part] = _mm512_fmadd_ps(one, s, _mm512_mul_ps(other, c));
    }
    put(to + at, a3::join(first), half - at);
    put(to + half + at, a3::join(second), half - at);
  }
}

}  // namespace

// keys, values        of each chunk, [layers][heads][tokens][dim]
// start, tokens       of each chunk
// to_keys, to_values  the cache's layers, from position 0 on; heads `stride[layer]` apart
// cosines, sines      of each layer, fp32 [positions][half]; 2 half <= dim, the rest is not turned
extern "C" void a3_place(const element* const* keys, const element* const* values,
                         const long* start, const long* tokens, long chunks,
                         element* const* to_keys, element* const* to_values, const long* stride,
                         const float* const* cosines, const float* const* sines, long layers,
                         long heads, long dim, long half, long threads) {
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
            const element* key = keys[chunk] + from + token * dim;
            element* turned = to_keys[layer] + to + token * dim;
            const long angle = (start[chunk] + token) * half;
            turn(key, cosines[layer] + angle, sines[layer] + angle, half, turned);
            copy(key + 2 * half, dim - 2 * half, turned + 2 * half);
          }
        }
    _mm_sfence();  // streamed stores obey no other order
  }
}
