// The counter-based generator behind every draw: Philox4x32-10 (Salmon et al., SC 2011). Twin of
// safecode_kernels/rng.py, which describes how (seed, stream, step, token) become key, counter and word. Host and
// device, no torch.
#pragma once

#include <cmath>
#include <cstdint>

#include "decode_step.h"

namespace safecode {

struct PhiloxWords {
  uint32_t word[4];
};

SAFECODE_HOST_DEVICE inline PhiloxWords philox(uint32_t block, const DrawKey& key) {
  uint32_t c0 = block, c1 = key.stream;
  uint32_t c2 = static_cast<uint32_t>(key.step), c3 = static_cast<uint32_t>(key.step >> 32);
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// A call of the cipher serves four tokens that lie 8 apart; 32 tokens share 8 calls.
SAFECODE_HOST_DEVICE inline uint32_t philox_block(uint32_t token) { return (token >> 5) * 8 + (token & 7); }
SAFECODE_HOST_DEVICE inline uint32_t philox_word(uint32_t token) { return (token >> 3) & 3; }

// The 32 random bits of a token. Selections and no index: a GPU keeps the words in registers.
SAFECODE_HOST_DEVICE inline uint32_t token_bits(uint32_t token, const DrawKey& key) {
  const PhiloxWords result = philox(philox_block(token), key);
  const uint32_t word = philox_word(token);
  const uint32_t low = word & 1 ? result.word[1] : result.word[0];
  const uint32_t high = word & 1 ? result.word[3] : result.word[2];
  return word & 2 ? high : low;
}

// The handicap of a token in the race, from its 32 bits.
SAFECODE_HOST_DEVICE inline double gumbel(uint32_t bits) {
  const double uniform = (bits + 0.5) * 0x1p-32;
  return -log(-log1p(-uniform));
}

}  // namespace safecode
