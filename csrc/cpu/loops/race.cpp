// The race of the draw over many tokens.
#include "philox_lanes.h"

namespace safecode::cpu::SAFECODE_ISA {
namespace {

constexpr int64_t kCalls = 16;  // of the cipher, side by side

// 64 neighbouring tokens from a multiple of 64 on: four words of 16 calls.
inline void bits_of_range(int64_t first, const DrawKey& key, uint32_t* bits) {
  const uint32_t first_block = philox_block(static_cast<uint32_t>(first));
  uint32_t blocks[kCalls], words[4][kCalls];
  for (uint32_t call = 0; call < kCalls; ++call) blocks[call] = first_block + call;
  philox_calls(blocks, key, words);
  for (int group = 0; group < 2; ++group) {
    for (int word = 0; word < 4; ++word) memcpy(bits + 32 * group + 8 * word, words[word] + 8 * group, 32);
  }
}

inline void bits_of_tokens(const int32_t* tokens, int64_t n, const DrawKey& key, uint32_t* bits) {
  uint32_t blocks[kCalls] = {}, words[4][kCalls];
  for (int64_t begin = 0; begin < n; begin += kCalls) {
    const int64_t calls = n - begin < kCalls ? n - begin : kCalls;
    for (int64_t i = 0; i < calls; ++i) blocks[i] = philox_block(static_cast<uint32_t>(tokens[begin + i]));
    philox_calls(blocks, key, words);
    for (int64_t i = 0; i < calls; ++i) bits[begin + i] = words[philox_word(static_cast<uint32_t>(tokens[begin + i]))][i];
  }
}

// An upper bound of score + gumbel without a logarithm. gumbel = -log(-log1p(-q)) <= -log(q), and the bits of a float,
// read as an integer, bound its binary logarithm from below: log2(1 + f) >= f.
inline void race_bounds(const float* scores, const uint32_t* bits, int64_t n, float* bounds) {
  constexpr float kLn2 = 0.69314718f;
  constexpr float kOffset = kLn2 * (31 + 127) + 1e-3f;  // q >= 2 (bits / 2) 2^-32; the rest covers fp32 rounding
  for (int64_t i = 0; i < n; ++i) {
    const float half = static_cast<float>(static_cast<int32_t>(bits[i] >> 1));
    const float log2_half = static_cast<float>(bit_cast<int32_t>(half)) * 0x1p-23f;  // too large by 127
    const float bound = (kOffset - kLn2 * log2_half) + scores[i];
    bounds[i] = bound + 1e-6f * (scores[i] > 0 ? scores[i] : -scores[i]);
  }
}

}  // namespace

RaceBest race(const Scored& scored, const DrawKey& key) {
  RaceBest best{-static_cast<double>(kInfinity), -1, -kInfinity};
  const DrawKey local = key;
  uint32_t bits[kRaceChunk];
  float bounds[kRaceChunk];
  for (int64_t begin = 0; begin < scored.size; begin += kRaceChunk) {
    const int64_t n = scored.size - begin < kRaceChunk ? scored.size - begin : kRaceChunk;
    const float* scores = scored.scores + begin;
    if (scored.tokens) {
      bits_of_tokens(scored.tokens + begin, n, local, bits);
    } else {
      for (int64_t i = 0; i < n; i += 64) bits_of_range(begin + i, local, bits + i);
    }
    race_bounds(scores, bits, n, bounds);
    for (int64_t i = 0; i < n; i += 64) {
      const int64_t end = n - i < 64 ? n : i + 64;
      const float limit = static_cast<float>(best.value);
      uint32_t any = 0;
      for (int64_t j = i; j < end; ++j) any |= bounds[j] > limit;
      for (int64_t j = i; any && j < end; ++j) {
        if (!(bounds[j] > best.value)) continue;
        const double value = scores[j] + gumbel(bits[j]);
        const int64_t token = scored.tokens ? scored.tokens[begin + j] : begin + j;
        if (value > best.value || (value == best.value && token < best.token)) best = {value, token, scores[j]};
      }
    }
  }
  return best;
}

}  // namespace safecode::cpu::SAFECODE_ISA
