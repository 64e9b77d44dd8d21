// Arithmetic of one token, exactly as the specification rounds it: fp32, no contraction into FMA (see CMakeLists.txt).
// Host and device, no torch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "philox.h"

namespace safecode {

constexpr float kLargestFloat = 3.4028234663852886e38f;
constexpr float kInfinity = __builtin_inff();

template <class To, class From>
SAFECODE_HOST_DEVICE inline To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

// ---- logits in memory to fp32: exact ----

SAFECODE_HOST_DEVICE inline float from_bfloat16(uint16_t bits) { return bit_cast<float>(uint32_t{bits} << 16); }

SAFECODE_HOST_DEVICE inline float from_float16(uint16_t bits) {
  const uint32_t magnitude = (bits & 0x7FFFu) << 13;
  const uint32_t exponent = magnitude & 0x0F800000u;
  const uint32_t rebased = magnitude + (112u << 23);
  // Subnormals without subnormal arithmetic, which a process may have switched off (flush to zero).
  const float subnormal = bit_cast<float>(rebased + (1u << 23)) - bit_cast<float>(113u << 23);
  const uint32_t special = rebased + (112u << 23);  // inf and NaN
  uint32_t result = exponent == 0x0F800000u ? special : rebased;
  result = exponent == 0 ? bit_cast<uint32_t>(subnormal) : result;
  return bit_cast<float>(result | (uint32_t{bits} & 0x8000u) << 16);
}

// ---- which clean logits are gathered ----

// A token can pass the cut only if z + max(bias, 0) >= (max z + min(bias, 0)) + log(beta): each sign of the bias stands
// on the side where the cut adds it again, and rounding is monotone, so no token that passes is missed by an ulp.
struct Gather {
  float raise;  // max(bias, 0)
  float lower;  // min(bias, 0)
  float log_beta;

  SAFECODE_HOST_DEVICE float floor(float best) const {
    const float value = (best + lower) + log_beta;
    return value >= -kLargestFloat ? value : -kLargestFloat;  // -inf is excluded whatever the floor, even inf - inf
  }
};

SAFECODE_HOST_DEVICE inline bool is_gathered(float z, float raise, float floor) { return z + raise >= floor; }

// ---- contrast ----

// (1 + a) z - a n with both products rounded; a score that overflows downwards excludes its token.
SAFECODE_HOST_DEVICE inline float contrast(float z, float n, float weight, float one_plus_weight) {
  const float scaled = one_plus_weight * z;
  const float score = scaled - weight * n;
  return scaled > -kInfinity ? score : -kInfinity;
}

// ---- refusal masks ----

SAFECODE_HOST_DEVICE inline bool in_mask(const int32_t* words, int64_t token) {
  return (static_cast<uint32_t>(words[token >> 5]) >> (token & 31)) & 1u;
}

}  // namespace safecode
