// Stored chunks into a cache, read once: their keys are turned on the way.

#include "element.h"

namespace {

constexpr long kVector = sizeof(__m512i) / sizeof(element);
constexpr int kParts = kVector / 16;

// `whole`: all counts are of whole vectors and all targets aligned to them. Masks would take longer
// to make than what is copied takes to come.

// A cache is larger than what a processor keeps at hand: written past it, memory is not read first.
template <bool whole>
void put(element* to, __m512i values, long count) {
  if (whole || (count >= kVector && reinterpret_cast<uintptr_t>(to) % sizeof(values) == 0))
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), values);
  else
    _mm512_mask_storeu_epi8(to, a3::bytes(count * sizeof(element)), values);
}

template <bool whole>
void copy(const element* from, long count, element* to) {
  for (long at = 0; at < count; at += kVector) {
    a3::ask(from + at + a3::kAhead, kVector);
    const __m512i values =
        whole ? _mm512_loadu_si512(from + at)
              : _mm512_maskz_loadu_epi8(a3::bytes((count - at) * sizeof(element)), from + at);
    put<whole>(to + at, values, count - at);
  }
}

template <bool whole>
void turn(const element* key, const float* cosine, const float* sine, long half, element* to) {
  for (long at = 0; at < half; at += kVector) {
    a3::ask(key + at + a3::kAhead, kVector);
    a3::ask(key + half + at + a3::kAhead, kVector);
    __m512 first[kParts], second[kParts];
    for (int part = 0; part < kParts; ++part) {
      const long d = at + 16 * part;
      const __mmask16 some = whole ? a3::kAll : a3::lanes(half - d);
      const __m512 c = _mm512_maskz_loadu_ps(some, cosine + d);
      const __m512 s = _mm512_maskz_loadu_ps(some, sine + d);
      const __m512 one = a3::widen(key + d, some), other = a3::widen(key + half + d, some);
      first[part] = _mm512_fnmadd_ps(other, s, _mm512_mul_ps(one, c));
      second[part] = _mm512_fmadd_ps(one, s, _mm512_mul_ps(other, c));
    }
    put<whole>(to + at, a3::join(first), half - at);
    put<whole>(to + half + at, a3::join(second), half - at);
  }
}

// One head's tokens of one chunk.
template <bool whole>
void place(const element* keys, const element* values, long tokens, const float* cosines,
           const float* sines, long dim, long half, element* to_keys, element* to_values) {
  copy<whole>(values, tokens * dim, to_values);
  for (long token = 0; token < tokens; ++token) {
    const element* key = keys + token * dim;
    element* turned = to_keys + token * dim;
    turn<whole>(key, cosines + token * half, sines + token * half, half, turned);
    copy<whole>(key + 2 * half, dim - 2 * half, turned + 2 * half);
  }
}

bool aligned(const element* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(__m512i) == 0;
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
  bool whole = half % kVector == 0 && dim % kVector == 0;
  for (long layer = 0; layer < layers; ++layer)
    whole = whole && aligned(to_keys[layer]) && aligned(to_values[layer]) &&
            stride[layer] % kVector == 0;
  const auto place_head = whole ? place<true> : place<false>;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for collapse(3) schedule(dynamic, 4) nowait
    for (long chunk = 0; chunk < chunks; ++chunk)
      for (long layer = 0; layer < layers; ++layer)
        for (long head = 0; head < heads; ++head) {
          const long n = tokens[chunk], from = (layer * heads + head) * n * dim;
          const long to = head * stride[layer] + start[chunk] * dim, angle = start[chunk] * half;
          place_head(keys[chunk] + from, values[chunk] + from, n, cosines[layer] + angle,
                     sines[layer] + angle, dim, half, to_keys[layer] + to, to_values[layer] + to);
        }
    _mm_sfence();  // streamed stores obey no other order
  }
}
