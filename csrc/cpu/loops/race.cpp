// The race of the draw over many tokens.
#include "philox_lanes.h"

namespace safecode::cpu::SAFECODE_ISA {
namespace {

constexpr int64_t kCalls = 16;        // of the cipher, for
constexpr int64_t kRange = 4 * kCalls;  // so many neighbouring tokens
constexpr int64_t kRivals = 128;        // tokens of which one look tells whether any can win
constexpr int64_t kRivalLanes = 16;
static_assert(kRivals % kRange == 0 && kRivals % kRivalLanes == 0, "whole ranges and lanes");

// kRange neighbouring tokens from a multiple of it on.
inline void bits_of_range(int64_t first, const DrawKey& key, const RoundKeys& keys, uint32_t* bits) {
  const uint32_t block = philox_block(static_cast<uint32_t>(first));
  for (int64_t call = 0; call < kCalls; call += kCallsAtOnce) {
    uint32_t* word = bits + 32 * (call / 8) + call % 8;
    calls_at_once(count_from(block + static_cast<uint32_t>(call)), key, keys, {word, word + 8, word + 16, word + 24});
  }
}

inline void bits_of_tokens(const int32_t* tokens, int64_t n, const DrawKey& key, const RoundKeys& keys, uint32_t* bits) {
  uint32_t blocks[kCalls] = {}, words[4][kCalls];
  for (int64_t begin = 0; begin < n; begin += kCalls) {
    const int64_t calls = n - begin < kCalls ? n - begin : kCalls;
    for (int64_t i = 0; i < calls; ++i) blocks[i] = philox_block(static_cast<uint32_t>(tokens[begin + i]));
    philox_calls(blocks, key, keys, words);
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

inline bool any_above(const float* bounds, int64_t n, float limit) {
  uint32_t any = 0;
  for (int64_t i = 0; i < n; ++i) any |= bounds[i] > limit;
  return any;
}

// Whether any of kRivals tokens might have score + gumbel above the limit: the largest score of a lane with the smallest
// bits of it bounds all tokens of the lane.
inline bool any_rival(const float* scores, const uint32_t* bits, float limit) {
  constexpr int64_t kHalf = kRivals / 2;
  float top[kHalf], bounds[kRivalLanes];
  uint32_t least[kHalf];
  for (int64_t i = 0; i < kHalf; ++i) top[i] = larger(scores[i], scores[i + kHalf]);
  for (int64_t i = 0; i < kHalf; ++i) least[i] = smaller(bits[i], bits[i + kHalf]);
  for (int64_t width = kHalf / 2; width >= kRivalLanes; width /= 2) {
    for (int64_t i = 0; i < width; ++i) top[i] = larger(top[i], top[i + width]);
    for (int64_t i = 0; i < width; ++i) least[i] = smaller(least[i], least[i + width]);
  }
  race_bounds(top, least, kRivalLanes, bounds);
  return any_above(bounds, kRivalLanes, limit);
}

}  // namespace

RaceBest race(const Scored& scored, const DrawKey& key) {
  RaceBest best{-static_cast<double>(kInfinity), -1, -kInfinity};
  const DrawKey local = key;
  const RoundKeys keys(local);
  uint32_t bits[kRivals];
  float bounds[kRivals];
  for (int64_t begin = 0; begin < scored.size; begin += kRivals) {
    const int64_t n = scored.size - begin < kRivals ? scored.size - begin : kRivals;
    const float* scores = scored.scores + begin;
    if (scored.tokens) {
      bits_of_tokens(scored.tokens + begin, n, local, keys, bits);
    } else {
      for (int64_t i = 0; i < n; i += kRange) bits_of_range(begin + i, local, keys, bits + i);
    }
    if (n == kRivals && !any_rival(scores, bits, static_cast<float>(best.value))) continue;
    race_bounds(scores, bits, n, bounds);
    for (int64_t i = 0; i < n; i += kRivalLanes) {
      if (!any_above(bounds + i, smaller(n - i, kRivalLanes), static_cast<float>(best.value))) continue;
      for (int64_t j = i; j < smaller(n, i + kRivalLanes); ++j) {
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
