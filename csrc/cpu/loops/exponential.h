// exp of numbers <= 0, twice: in double for what is compared, in single precision for what is only reported.
#pragma once

#include "isa.h"

namespace safecode::cpu::SAFECODE_ISA {
namespace {

// Masses are reported or compared in double, so here, and only here, one rounding instead of two is welcome.
template <class T>
inline T multiply_add(T a, T b, T c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  if constexpr (sizeof(T) == 4) return __builtin_fmaf(a, b, c);
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// exp(x) = 2^k exp(r) with |r| <= ln(2) / 2, and the Taylor series to r^12, whose rest is below 2e-16.
inline double exponential(double x) {
  constexpr double kRoundingShift = 0x1.8p52;  // added and taken away again: rounds to an integer
  const double inside = x > -708.0 ? x : -708.0;
  const double shifted = multiply_add(inside, 1.4426950408889634, kRoundingShift);
  const double k = shifted - kRoundingShift;
  const double r = multiply_add(k, -0x1.cf79abc9e3b3ap-40, multiply_add(k, -0x1.62e42fefap-1, inside));
  double series = 1.0 / 479001600;
  series = multiply_add(series, r, 1.0 / 39916800);
  series = multiply_add(series, r, 1.0 / 3628800);
  series = multiply_add(series, r, 1.0 / 362880);
  series = multiply_add(series, r, 1.0 / 40320);
  series = multiply_add(series, r, 1.0 / 5040);
  series = multiply_add(series, r, 1.0 / 720);
  series = multiply_add(series, r, 1.0 / 120);
  series = multiply_add(series, r, 1.0 / 24);
  series = multiply_add(series, r, 1.0 / 6);
  series = multiply_add(series, r, 0.5);
  series = multiply_add(series, r, 1.0);
  series = multiply_add(series, r, 1.0);
  const uint64_t scaled = bit_cast<uint64_t>(series) + (bit_cast<uint64_t>(shifted) << 52);
  return x > -708.0 ? bit_cast<double>(scaled) : 0.0;
}

// The same in single precision with a polynomial fitted on |r| <= ln(2) / 2: relative error below 1e-6, and exp(0) is 1.
// Below -87 it stays at 1e-38, which no sum with a 1 in it notices.
inline float exponential(float x) {
  constexpr float kRoundingShift = 0x1.8p23f;
  const float inside = x > -87.0f ? x : -87.0f;
  const float shifted = multiply_add(inside, 1.44269504f, kRoundingShift);
  const float k = shifted - kRoundingShift;
  const float r = multiply_add(k, -0.693147181f, inside);
  float series = 0.0083572045f;
  series = multiply_add(series, r, 0.0418338366f);
  series = multiply_add(series, r, 0.166666314f);
  series = multiply_add(series, r, 0.499997497f);
  series = multiply_add(series, r, 1.0f);
  series = multiply_add(series, r, 1.0f);
  const uint32_t scaled = bit_cast<uint32_t>(series) + (bit_cast<uint32_t>(shifted) << 23);
  return bit_cast<float>(scaled);
}

}  // namespace
}  // namespace safecode::cpu::SAFECODE_ISA
