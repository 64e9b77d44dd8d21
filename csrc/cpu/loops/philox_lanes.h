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

#if defined(__AVX2__)
using Words = __m256i;
inline Words all(uint32_t x) { return _mm256_set1_epi32(static_cast<int32_t>(x)); }
inline Words load(const uint32_t* x) { return _mm256_loadu_si256(reinterpret_cast<const Words*>(x)); }
inline void store(Words x, uint32_t* out) { _mm256_storeu_si256(reinterpret_cast<Words*>(out), x); }
inline Words exclusive_or(Words a, Words b, Words c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline void multiply(Words x, Words multiplier, Words& high, Words& low) {
  const Words even = _mm256_mul_epu32(x, multiplier), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), multiplier);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
#else
using Words = uint32_t;
inline Words all(uint32_t x) { return x; }
inline Words load(const uint32_t* x) { return *x; }
inline void store(Words x, uint32_t* out) { *out = x; }
inline Words exclusive_or(Words a, Words b, Words c) { return a ^ b ^ c; }
inline void multiply(Words x, Words multiplier, Words& high, Words& low) {
  const uint64_t product = uint64_t{x} * multiplier;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
}
#endif

constexpr int64_t kCallsAtOnce = sizeof(Words) / sizeof(uint32_t);

// The cipher on kCallsAtOnce blocks; word w of call i goes to out[w][i]. See philox.h.
template <int64_t kCalls>
inline void philox_calls(const uint32_t* blocks, const DrawKey& key, uint32_t (&out)[4][kCalls]) {
  static_assert(kCalls % kCallsAtOnce == 0, "whole registers");
  const Words multiplier0 = all(0xD2511F53u), multiplier1 = all(0xCD9E8D57u);
  for (int64_t call = 0; call < kCalls; call += kCallsAtOnce) {
    Words c0 = load(blocks + call), c1 = all(key.stream);
    Words c2 = all(static_cast<uint32_t>(key.step)), c3 = all(static_cast<uint32_t>(key.step >> 32));
    auto k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
    for (int round = 0; round < 10; ++round) {
      Words high0, low0, high1, low1;
      multiply(c0, multiplier0, high0, low0);
      multiply(c2, multiplier1, high1, low1);
      c0 = exclusive_or(high1, c1, all(k0));
      c2 = exclusive_or(high0, c3, all(k1));
      c1 = low1;
      c3 = low0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    store(c0, out[0] + call);
    store(c1, out[1] + call);
    store(c2, out[2] + call);
    store(c3, out[3] + call);
  }
}

}  // namespace
}  // namespace safecode::cpu::SAFECODE_ISA
