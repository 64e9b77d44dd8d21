// The three dtypes of logits, and their ranks: integers in the order of the logits, -inf lowest, every NaN above +inf.
// Maxima are kept as keys, the fastest type that has the order of the logits: floats as they are, whose maximum passes over
// a NaN, so that it must be looked for beside it; 16-bit formats as ranks, whose maximum shows a NaN.
#pragma once

#include "isa.h"

namespace safecode::cpu::SAFECODE_ISA {
namespace {

template <class Rank, class Bits, int kMantissaBits>
struct RankOf {
  static constexpr int kSignShift = 8 * sizeof(Bits) - 1;
  static constexpr Bits kMagnitude = static_cast<Bits>(~(Bits{1} << kSignShift));
  static constexpr Bits kNanPayloads = static_cast<Bits>((Bits{1} << kMantissaBits) - 1);  // below -inf: moved to the top

  static inline Rank rank(Bits bits) {
    const Rank sign = static_cast<Rank>(static_cast<Rank>(bits) >> kSignShift);
    const Bits ordered = static_cast<Bits>(bits ^ (static_cast<Bits>(sign) & kMagnitude));
    return static_cast<Rank>(static_cast<Bits>(ordered - kNanPayloads));
  }
  static inline Bits bits(Rank rank) {
    const Bits ordered = static_cast<Bits>(static_cast<Bits>(rank) + kNanPayloads);
    const Rank sign = static_cast<Rank>(static_cast<Rank>(ordered) >> kSignShift);
    return static_cast<Bits>(ordered ^ (static_cast<Bits>(sign) & kMagnitude));
  }
};

struct Float32 : RankOf<int32_t, uint32_t, 23> {
  using Rank = int32_t;
  using Bits = uint32_t;
  using Stored = float;  // the type in memory: loaded as what it is compared as
  using Key = float;
  static constexpr bool kKeysShowNan = false;
  static constexpr int64_t kLanes = 32;  // running values kept side by side: what fits into registers
  static inline Key key(Stored logit) { return logit; }
  static inline Key key_of(Bits bits) { return value(bits); }
  static inline Bits from_key(Key key) { return bit_cast<uint32_t>(key); }
  static inline int32_t magnitude(Stored logit) { return bit_cast<int32_t>(logit) & 0x7FFFFFFF; }
  static constexpr Bits kInfinityBits = 0x7F800000u;
  static inline float value(Bits bits) { return bit_cast<float>(bits); }
  static inline float value(Stored logit) { return logit; }
  static inline Bits nearest_below(float x) { return bit_cast<uint32_t>(x); }
};

struct BFloat16 : RankOf<int16_t, uint16_t, 7> {
  using Rank = int16_t;
  using Bits = uint16_t;
  using Stored = Bits;
  using Key = Rank;
  static constexpr bool kKeysShowNan = true;
  static constexpr int64_t kLanes = 64;
  static inline Key key(Stored logit) { return rank(logit); }
  static inline Key key_of(Bits bits) { return rank(bits); }
  static inline Bits from_key(Key key) { return bits(key); }
  static constexpr Bits kInfinityBits = 0x7F80u;
  static inline float value(Bits bits) { return from_bfloat16(bits); }
  static inline Bits nearest_below(float x) { return static_cast<Bits>(bit_cast<uint32_t>(x) >> 16); }
};

struct Float16 : RankOf<int16_t, uint16_t, 10> {
  using Rank = int16_t;
  using Bits = uint16_t;
  using Stored = Bits;
  using Key = Rank;
  static constexpr bool kKeysShowNan = true;
  static constexpr int64_t kLanes = 64;
  static inline Key key(Stored logit) { return rank(logit); }
  static inline Key key_of(Bits bits) { return rank(bits); }
  static inline Bits from_key(Key key) { return bits(key); }
  static constexpr Bits kInfinityBits = 0x7C00u;
  static inline float value(Bits bits) { return from_float16(bits); }
  // A guess is enough: within the normal range it is the value cut off, else the end of the range.
  static inline Bits nearest_below(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7FFFFFFFu;
    const uint32_t rebased = magnitude < (113u << 23) ? 0 : (magnitude >> 13) - (112u << 10);
    return static_cast<Bits>((rebased < 0x7BFFu ? rebased : 0x7BFFu) | (bits >> 31) << 15);
  }
};

template <class Function>
inline auto with_format(DType dtype, Function&& function) {
  if (dtype == DType::kBFloat16) return function(BFloat16{});
  if (dtype == DType::kFloat16) return function(Float16{});
  return function(Float32{});
}

template <class Format>
constexpr auto kExcludedRank = static_cast<typename Format::Rank>(int64_t{-1} * (int64_t{1} << Format::kSignShift));

template <class Format>
inline typename Format::Key excluded_key() {
  return Format::key_of(Format::bits(kExcludedRank<Format>));
}

// Running maxima of a format's keys and, where keys do not show a NaN, of magnitudes, which do. Plain arrays of the
// caller's, so that the compiler keeps them in registers.
template <class Format>
using Lanes = typename Format::Key[Format::kLanes];
template <class Format>
using Magnitudes = int32_t[Format::kKeysShowNan ? 1 : Format::kLanes];

// Starts the maxima. A NaN key stays; its magnitude tells.
template <class Format>
inline void start(const typename Format::Stored* logits, Lanes<Format>& lanes, Magnitudes<Format>& magnitudes) {
  for (int64_t lane = 0; lane < Format::kLanes; ++lane) {
    lanes[lane] = Format::key(logits[lane]);
    if constexpr (!Format::kKeysShowNan) {
      magnitudes[lane] = larger(Format::magnitude(logits[lane]), magnitudes[lane]);
    }
  }
}

template <class Format>
inline void take(const typename Format::Stored* logits, Lanes<Format>& lanes, Magnitudes<Format>& magnitudes) {
  for (int64_t lane = 0; lane < Format::kLanes; ++lane) {
    const auto key = Format::key(logits[lane]);
    lanes[lane] = larger(key, lanes[lane]);
    if constexpr (!Format::kKeysShowNan) {
      magnitudes[lane] = larger(Format::magnitude(logits[lane]), magnitudes[lane]);
    }
  }
}

// The same for fewer logits than there are lanes.
template <class Format>
inline void take_some(const typename Format::Stored* logits, int64_t n, Lanes<Format>& lanes,
                      Magnitudes<Format>& magnitudes) {
  for (int64_t lane = 0; lane < n; ++lane) {
    const auto key = Format::key(logits[lane]);
    lanes[lane] = larger(key, lanes[lane]);
    if constexpr (!Format::kKeysShowNan) {
      magnitudes[lane] = larger(Format::magnitude(logits[lane]), magnitudes[lane]);
    }
  }
}

// The largest logit of n keys; NaN if there was one.
template <class Format>
inline float largest(const typename Format::Key* keys, int64_t n, const Magnitudes<Format>& magnitudes) {
  auto top = keys[0];
  for (int64_t i = 1; i < n; ++i) top = larger(keys[i], top);
  bool found_nan = false;
  if constexpr (Format::kKeysShowNan) {
    found_nan = top > Format::key_of(Format::kInfinityBits);
  } else {
    for (const int32_t magnitude : magnitudes) found_nan |= magnitude > static_cast<int32_t>(Format::kInfinityBits);
  }
  return found_nan ? __builtin_nanf("") : Format::value(Format::from_key(top));
}

}  // namespace
}  // namespace safecode::cpu::SAFECODE_ISA
