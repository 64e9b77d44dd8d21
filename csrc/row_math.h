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
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#else
  const uint32_t magnitude = (bits & 0x7FFFu) << 13;
  const uint32_t exponent = magnitude & 0x0F800000u;
  const uint32_t rebased = magnitude + (112u << 23);
  // Subnormals without subnormal arithmetic, which a process may have switched off (flush to zero).
  const float subnormal = bit_cast<float>(rebased + (1u << 23)) - bit_cast<float>(113u << 23);
  const uint32_t special = rebased + (112u << 23);  // inf and NaN
  uint32_t result = exponent == 0x0F800000u ? special : rebased;
  result = exponent == 0 ? bit_cast<uint32_t>(subnormal) : result;
  return bit_cast<float>(result | (uint32_t{bits} & 0x8000u) << 16);
#endif
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

// `bias` is the row's, 0 for a row without a mask.
SAFECODE_HOST_DEVICE inline Gather gather_of(float bias, float log_beta) {
  return {bias > 0 ? bias : 0.0f, bias < 0 ? bias : 0.0f, log_beta};
}

SAFECODE_HOST_DEVICE inline bool is_gathered(float z, float raise, float floor) { return z + raise >= floor; }

// ---- contrast ----

// (1 + a) z - a n with both products rounded; a score that overflows downwards excludes its token.
SAFECODE_HOST_DEVICE inline float contrast(float z, float n, float weight, float one_plus_weight) {
  const float scaled = one_plus_weight * z;
  const float score = scaled - weight * n;
  return scaled > -kInfinity ? score : -kInfinity;
}

// What the contrast met at candidates.
constexpr uint32_t kMetNanNoised = 1;
constexpr uint32_t kMetInfiniteNoised = 2;
constexpr uint32_t kMetOverflow = 4;

// The same with every rule for logits that are not finite, and without a branch. `is_candidate` is 0 or 1: at any other
// token a noised logit that is not finite contributes nothing. A score that is no number below +inf becomes -inf.
SAFECODE_HOST_DEVICE inline float contrast_by_rules(float z, float raw, uint32_t is_candidate, float weight,
                                                    float one_plus_weight, uint32_t& met) {
  const uint32_t is_nan = raw != raw, is_infinite = raw == kInfinity;
  const uint32_t unusable = (raw == -kInfinity) | ((is_nan | is_infinite) & (is_candidate ^ 1u));
  const float other = unusable ? z : raw;
  const float score = contrast(z, other, weight, one_plus_weight);
  const uint32_t overflow = !(score < kInfinity);
  met |= is_candidate & is_nan ? kMetNanNoised : 0u;
  met |= is_candidate & is_infinite ? kMetInfiniteNoised : 0u;
  met |= is_candidate & overflow ? kMetOverflow : 0u;
  return overflow ? -kInfinity : score;
}

// ---- statuses ----

// What the largest of a row's logits shows; NaN if any is NaN.
SAFECODE_HOST_DEVICE inline Status status_of_best(float best) {
  if (best != best) return Status::kNanClean;
  if (best == kInfinity) return Status::kInfinite;
  return best == -kInfinity ? Status::kNothingFinite : Status::kOk;
}

SAFECODE_HOST_DEVICE inline Status status_of_contrast(uint32_t met) {
  if (met & kMetNanNoised) return Status::kNanNoised;
  return met & (kMetInfiniteNoised | kMetOverflow) ? Status::kInfinite : Status::kOk;
}

// ---- refusal masks ----

SAFECODE_HOST_DEVICE inline bool in_mask(const int32_t* words, int64_t token) {
  return (static_cast<uint32_t>(words[token >> 5]) >> (token & 31)) & 1u;
}

}  // namespace safecode
