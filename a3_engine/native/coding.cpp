// Interleaved rANS; what it does is said in chunks/codecs/coder.py.

#include <cstdint>

namespace {
constexpr int kBits = 12;
constexpr uint32_t kLow = 1u << 16;
}  // namespace

extern "C" void a3_encode(const uint8_t* symbols, const uint8_t* columns, const uint32_t* freq,
                          const uint32_t* start, long n_symbols, long n_streams, long n_columns,
                          long n_tokens, long n_lanes, uint32_t* states, uint16_t* room,
                          long* counts, long threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (long stream = 0; stream < n_streams; ++stream) {
    uint32_t* state = states + stream * n_lanes;
    for (long lane = 0; lane < n_lanes; ++lane) state[lane] = kLow;
    uint16_t* const end = room + (stream + 1) * n_columns * n_tokens;
    uint16_t* word = end;
    for (long column = n_columns - 1; column >= 0; --column) {
      const long at = stream * n_columns + column;
      const uint32_t* f = freq + columns[at] * n_symbols;
      const uint32_t* s = start + columns[at] * n_symbols;
      const uint8_t* line = symbols + at * n_tokens;
      for (long token = n_tokens - 1; token >= 0; --token) {
        uint32_t& x = state[token % n_lanes];
        const uint32_t share = f[line[token]];
        if (x >= share << (32 - kBits)) {
          *--word = static_cast<uint16_t>(x);
          x >>= 16;
        }
        x = (x / share << kBits) + x % share + s[line[token]];
      }
    }
    counts[stream] = end - word;
  }
}

extern "C" void a3_decode(const uint32_t* states, const uint16_t* words, const long* ends,
                          const uint8_t* columns, const uint32_t* slots, long n_streams,
                          long n_columns, long n_tokens, long n_lanes, float* out, long threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (long stream = 0; stream < n_streams; ++stream) {
    uint32_t state[64];
    for (long lane = 0; lane < n_lanes; ++lane) state[lane] = states[stream * n_lanes + lane];
    const uint16_t* word = words + (stream ? ends[stream - 1] : 0);
    const uint16_t* const end = words + ends[stream];
    for (long column = 0; column < n_columns; ++column) {
      const long at = stream * n_columns + column;
      const uint32_t* table = slots + (static_cast<long>(columns[at]) << kBits);
      float* line = out + at * n_tokens;
      for (long first = 0; first < n_tokens; first += n_lanes) {
        const long n = n_tokens - first < n_lanes ? n_tokens - first : n_lanes;
        for (long lane = 0; lane < n; ++lane) {
          uint32_t x = state[lane];
          const uint32_t slot = table[x & ((1u << kBits) - 1)];
          x = (slot >> 20) * (x >> kBits) + (slot >> 8 & ((1u << kBits) - 1));
          const uint32_t next = word < end ? *word : 0;
          const bool empty = x < kLow;
          state[lane] = empty ? x << 16 | next : x;
          word += empty && word < end;
          line[first + lane] = static_cast<float>(static_cast<int>(slot & 0xff) - 127);
        }
      }
    }
  }
}
