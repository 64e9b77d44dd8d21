// Several calls of the cipher side by side. The only intrinsics of this folder: from plain loops compilers make the
// product of two 32-bit lanes with shuffles around it, and a draw over a whole vocabulary then takes 1.5 times as long
// (benchmarks/decode_step.py, mode temperature at beta 0).
#pragma once

#include "isa.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace safecode::cpu::SAFECODE_ISA {
namespace {

// The keys of all rounds.
struct RoundKeys {
  uint32_t k0[10], k1[10];

  explicit RoundKeys(const DrawKey& key) {
    for (uint32_t round = 0; round < 10; ++round) {
      k0[round] = static_cast<uint32_t>(key.seed) + round * 0x9E3779B9u;
      k1[round] = static_cast<uint32_t>(key.seed >> 32) + round * 0xBB67AE85u;
    }
  }
};

#if defined(__AVX2__)
constexpr int64_t kCallsAtOnce = 8;
using Words = __m256i;
inline Words all(uint32_t x) { return _mm256_set1_epi32(static_cast<int32_t>(x)); }
inline Words load(const uint32_t* x) { return _mm256_loadu_si256(reinterpret_cast<const Words*>(x)); }
inline Words count_from(uint32_t first) { return _mm256_add_epi32(all(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
inline Words upper(Words x) { return _mm256_srli_epi64(x, 32); }

// The counters of four calls, each word in the lower half of a 64-bit lane, where the multiplier looks for it. What a
// product leaves in the upper half is never read.
struct Counters {
  Words c0, c1, c2, c3;

  inline void round(Words k0, Words k1) {
    const Words product0 = _mm256_mul_epu32(c0, all(0xD2511F53u)), product1 = _mm256_mul_epu32(c2, all(0xCD9E8D57u));
    c0 = _mm256_xor_si256(upper(product1), _mm256_xor_si256(c1, k0));
    c2 = _mm256_xor_si256(upper(product0), _mm256_xor_si256(c3, k1));
    c1 = product1;
    c3 = product0;
  }
};

inline void store(Words even, Words odd, uint32_t* out) {
  const Words words = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  _mm256_storeu_si256(reinterpret_cast<Words*>(out), words);
}

inline void calls_at_once(Words block, const DrawKey& key, const RoundKeys& keys, uint32_t* const (&out)[4]) {
  const Words c1 = all(key.stream);
  const Words c2 = all(static_cast<uint32_t>(key.step)), c3 = all(static_cast<uint32_t>(key.step >> 32));
  Counters even{block, c1, c2, c3}, odd{upper(block), c1, c2, c3};
  for (int round = 0; round < 10; ++round) {
    const Words k0 = all(keys.k0[round]), k1 = all(keys.k1[round]);
    even.round(k0, k1);
    odd.round(k0, k1);
  }
  store(even.c0, odd.c0, out[0]);
  store(even.c1, odd.c1, out[1]);
  store(even.c2, odd.c2, out[2]);
  store(even.c3, odd.c3, out[3]);
}
#else
constexpr int64_t kCallsAtOnce = 1;
using Words = uint32_t;
inline Words load(const uint32_t* x) { return *x; }
inline Words count_from(uint32_t first) { return first; }
inline void calls_at_once(Words block, const DrawKey& key, const RoundKeys&, uint32_t* const (&out)[4]) {
  const PhiloxWords words = philox(block, key);
  for (int word = 0; word < 4; ++word) *out[word] = words.word[word];
}
#endif

// The cipher on kCalls blocks; word w of call i goes to out[w][i]. See philox.h.
template <int64_t kCalls>
inline void philox_calls(const uint32_t* blocks, const DrawKey& key, const RoundKeys& keys, uint32_t (&out)[4][kCalls]) {
  static_assert(kCalls % kCallsAtOnce == 0, "whole registers");
  for (int64_t call = 0; call < kCalls; call += kCallsAtOnce) {
    calls_at_once(load(blocks + call), key, keys, {out[0] + call, out[1] + call, out[2] + call, out[3] + call});
  }
}

}  // namespace
}  // namespace safecode::cpu::SAFECODE_ISA
