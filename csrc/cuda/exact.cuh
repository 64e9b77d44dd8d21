// The order of tokens and the sums of probabilities as integers: both exact, so no result depends on how a row was
// split over blocks and threads or on the order in which they came.
#pragma once

#include "platform.cuh"

namespace safecode::cuda {

// ---- order ----

// Falls as x rises; -0 equals 0. x is no NaN.
__device__ inline uint32_t descending(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x + 0.0f);
  return bits >> 31 ? bits : ~bits & 0x7FFFFFFFu;
}

__device__ inline float score_of_descending(uint32_t key) {
  return bit_cast<float>(key >> 31 ? key : ~key & 0x7FFFFFFFu);
}

// (score descending, id ascending) as one number that rises; every filter keeps the tokens up to some key. The id takes
// the lowest bits and no more of them than V needs, so that a search over keys wastes no rounds.
struct TokenOrder {
  int id_bits;

  __device__ static TokenOrder of(uint32_t vocab_size) { return {vocab_size > 1 ? 32 - __clz(vocab_size - 1) : 0}; }
  __device__ uint64_t key(float score, uint32_t token) const {
    return uint64_t{descending(score)} << id_bits | token;
  }
  // The key of the last token that a score might have.
  __device__ uint64_t last_of_score(uint32_t descending_score) const {
    return (uint64_t{descending_score} << id_bits) + ((uint64_t{1} << id_bits) - 1);
  }
  __device__ float score(uint64_t key) const { return score_of_descending(static_cast<uint32_t>(key >> id_bits)); }
  __device__ uint32_t token(uint64_t key) const {
    return static_cast<uint32_t>(key & ((uint64_t{1} << id_bits) - 1));
  }
};

constexpr uint64_t kNoKey = ~uint64_t{0};  // after every key

// ---- mass ----

// Weights in [0, 1] in units of 2^-62. What is cut off is far below the rounding of sums in fp64.
__device__ inline uint64_t units(double weight) { return static_cast<uint64_t>(weight * 0x1p62); }
__device__ inline uint64_t units(float weight) { return static_cast<uint64_t>(weight * 0x1p62f); }

// A sum of units; 128 bits hold 2^31 tokens of weight 1.
struct Mass {
  uint64_t low, high;

  // The least mass that is not below x.
  __device__ static Mass at_least(double x) {
    const auto fours = static_cast<uint64_t>(x * 0.25);
    const double rest = (x - static_cast<double>(fours) * 4) * 0x1p62;
    Mass mass{static_cast<uint64_t>(rest), fours};
    if (static_cast<double>(mass.low) < rest) mass.add(1);
    return mass;
  }
  __device__ void add(uint64_t more) {
    low += more;
    high += low < more;
  }
  __device__ void subtract(const Mass& other) {
    high -= other.high + (low < other.low);
    low -= other.low;
  }
  __device__ bool is_below(const Mass& other) const {
    return high < other.high || (high == other.high && low < other.low);
  }
  __device__ double value() const { return static_cast<double>(high) * 4.0 + static_cast<double>(low) * 0x1p-62; }
};

// ---- operations for reductions ----

struct Larger {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

struct LargerOrNan {
  __device__ float operator()(float a, float b) const { return max_nan(a, b); }
};

struct Smaller {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct AnyBit {
  __device__ uint32_t operator()(uint32_t a, uint32_t b) const { return a | b; }
};

struct MassSum {
  __device__ Mass operator()(Mass a, Mass b) const {
    a.add(b.low);
    a.high += b.high;
    return a;
  }
};

}  // namespace safecode::cuda
