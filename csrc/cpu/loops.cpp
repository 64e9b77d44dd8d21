// Plain loops that the compiler vectorises. CMake compiles this file once per instruction set with SAFECODE_ISA naming the
// namespace. It must not instantiate templates of the standard library: the linker keeps one copy of those for all
// callers, which might be the one that this processor cannot run.
#include "loops.h"

#ifndef SAFECODE_ISA
#define SAFECODE_ISA baseline
#endif
#define SAFECODE_TEXT_(x) #x
#define SAFECODE_TEXT(x) SAFECODE_TEXT_(x)

namespace safecode::cpu::SAFECODE_ISA {
namespace {

constexpr int64_t kLanes = 64;  // running maxima kept side by side

template <class T>
inline T larger(T a, T b) {
  return a > b ? a : b;
}

// ---- ranks: integers in the order of the logits, -inf lowest, every NaN above +inf ----
// Integer maxima vectorise on every processor, and one maximum also shows whether there was a NaN.

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
  static constexpr Bits kInfinityBits = 0x7F800000u;
  static inline float value(Bits bits) { return bit_cast<float>(bits); }
  static inline Bits nearest_below(float x) { return bit_cast<uint32_t>(x); }
};

struct BFloat16 : RankOf<int16_t, uint16_t, 7> {
  using Rank = int16_t;
  using Bits = uint16_t;
  static constexpr Bits kInfinityBits = 0x7F80u;
  static inline float value(Bits bits) { return from_bfloat16(bits); }
  static inline Bits nearest_below(float x) { return static_cast<Bits>(bit_cast<uint32_t>(x) >> 16); }
};

struct Float16 : RankOf<int16_t, uint16_t, 10> {
  using Rank = int16_t;
  using Bits = uint16_t;
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

// ---- scan ----

template <class Format>
constexpr auto kExcludedRank = static_cast<typename Format::Rank>(int64_t{-1} * (int64_t{1} << Format::kSignShift));

// The smallest rank whose logit is gathered, given the floor. `is_gathered` is monotone in the logit.
template <class Format>
int32_t least_gathered_rank(const Gather& gather, float floor) {
  const auto gathered = [&](int64_t rank) {
    using Rank = typename Format::Rank;
    return is_gathered(Format::value(Format::bits(static_cast<Rank>(rank))), gather.raise, floor);
  };
  // Ranks below `low` are not gathered, `high` is: gallop away from the guess, then halve what is left.
  int64_t low = kExcludedRank<Format> + int64_t{1};
  int64_t high = Format::rank(Format::kInfinityBits);
  int64_t guess = Format::rank(Format::nearest_below(floor - gather.raise));
  guess = guess < low ? low : guess > high ? high : guess;
  if (gathered(guess)) {
    high = guess;
    for (int64_t step = 1; low < high; step *= 2) {
      const int64_t probe = high - step > low ? high - step : low;
      if (!gathered(probe)) {
        low = probe + 1;
        break;
      }
      high = probe;
    }
  } else {
    low = guess + 1;
    for (int64_t step = 1; low < high; step *= 2) {
      const int64_t probe = low + step - 1 < high ? low + step - 1 : high - 1;
      if (gathered(probe)) {
        high = probe;
        break;
      }
      low = probe + 1;
    }
  }
  while (low < high) {
    const int64_t middle = low + ((high - low) >> 1);
    if (gathered(middle)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return static_cast<int32_t>(high);
}

template <class Format>
inline void lane_maxima(const typename Format::Bits* logits, int64_t n, typename Format::Rank* lanes) {
  for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = kExcludedRank<Format>;
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = larger(lanes[lane], Format::rank(logits[i + lane]));
  }
  for (int64_t i = whole; i < n; ++i) lanes[i - whole] = larger(lanes[i - whole], Format::rank(logits[i]));
}

template <class Format>
inline typename Format::Rank largest_lane(const typename Format::Rank* lanes) {
  typename Format::Rank top = kExcludedRank<Format>;
  for (int64_t lane = 0; lane < kLanes; ++lane) top = larger(top, lanes[lane]);
  return top;
}

// One byte per lane: whether it holds a candidate. Returns whether any does.
template <class Format>
inline bool find_hits(const typename Format::Rank* lanes, int32_t least_rank, uint64_t (&hits)[kLanes / 8]) {
  const auto least = static_cast<typename Format::Rank>(least_rank);
  uint8_t hit[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) hit[lane] = lanes[lane] >= least;
  memcpy(hits, hit, sizeof(hits));
  uint64_t any = 0;
  for (const uint64_t eight : hits) any |= eight;
  return any != 0;
}

template <class Format>
inline void append(const typename Format::Bits* logits, int64_t n, int64_t first_token,
                   const uint64_t (&hits)[kLanes / 8], Scan& scan) {
  using Rank = typename Format::Rank;
  const float least = Format::value(Format::bits(static_cast<Rank>(scan.least_rank)));
  int32_t* tokens = scan.tokens;
  float* values = scan.logits;
  int64_t size = scan.size;
  for (int64_t eight = 0; eight < kLanes / 8; ++eight) {
    for (uint64_t left = hits[eight]; left; left &= left - 1) {  // each byte is 0 or 1
      const int64_t lane = 8 * eight + __builtin_ctzll(left) / 8;
      for (int64_t i = lane; i < n; i += kLanes) {  // no branch: it would be mispredicted at every candidate
        const float value = Format::value(logits[i]);
        tokens[size] = static_cast<int32_t>(first_token + i);
        values[size] = value;
        size += value >= least;
      }
    }
  }
  scan.size = size;
}

template <class Format>
int64_t scan_format(const LogitRow& row, int64_t begin, Scan& scan) {
  using Rank = typename Format::Rank;
  const auto* logits = static_cast<const typename Format::Bits*>(row.data);
  for (int64_t n; begin < row.size; begin += n) {
    n = row.size - begin < kScanChunk ? row.size - begin : kScanChunk;
    Rank lanes[kLanes];
    uint64_t hits[kLanes / 8];
    lane_maxima<Format>(logits + begin, n, lanes);
    if (!find_hits<Format>(lanes, scan.least_rank, hits)) continue;
    if (scan.capacity - scan.size <= n) return begin;
    const Rank top = largest_lane<Format>(lanes);
    if (top > Format::rank(Format::kInfinityBits)) {
      scan.found_nan = true;
      return row.size;
    }
    const float best = Format::value(Format::bits(top));
    if (best > scan.best) {
      scan.best = best;
      scan.least_rank = least_gathered_rank<Format>(scan.gather, scan.gather.floor(best));
      find_hits<Format>(lanes, scan.least_rank, hits);
    }
    append<Format>(logits + begin, n, begin, hits, scan);
  }
  return begin;
}

int64_t scan(const LogitRow& row, int64_t begin, Scan& state) {
  return with_format(row.dtype, [&](auto format) { return scan_format<decltype(format)>(row, begin, state); });
}

void start_scan(DType dtype, Scan& scan) {
  scan.best = -kInfinity;
  scan.found_nan = false;
  scan.size = 0;
  scan.least_rank = with_format(dtype, [](auto format) { return kExcludedRank<decltype(format)> + int32_t{1}; });
}

// ---- whole rows ----

template <class Format>
float widen_format(const void* data, int64_t begin, int64_t n, float* out) {
  using Rank = typename Format::Rank;
  const auto* logits = static_cast<const typename Format::Bits*>(data) + begin;
  Rank lanes[kLanes];
  lane_maxima<Format>(logits, n, lanes);
  const Rank top = largest_lane<Format>(lanes);
  for (int64_t i = 0; i < n; ++i) out[i] = Format::value(logits[i]);
  if (top > Format::rank(Format::kInfinityBits)) return __builtin_nanf("");
  return Format::value(Format::bits(top));
}

float widen(const LogitRow& row, int64_t begin, int64_t n, float* out) {
  return with_format(row.dtype,
                     [&](auto format) { return widen_format<decltype(format)>(row.data, begin, n, out); });
}

template <class Format>
void convert_format(const void* data, int64_t begin, int64_t n, float* out) {
  const auto* logits = static_cast<const typename Format::Bits*>(data) + begin;
  for (int64_t i = 0; i < n; ++i) out[i] = Format::value(logits[i]);
}

void convert(const LogitRow& row, int64_t begin, int64_t n, float* out) {
  with_format(row.dtype, [&](auto format) { convert_format<decltype(format)>(row.data, begin, n, out); });
}

// With every rule for logits that are not finite.
uint32_t contrast_carefully(const float* z, const float* noised, int64_t n, const ContrastParams& p, float* scores) {
  uint32_t met = 0;
#pragma omp simd reduction(| : met)
  for (int64_t i = 0; i < n; ++i) {
    const float clean = z[i], raw = noised[i];
    const uint32_t gathered = is_gathered(clean, p.raise, p.floor) && clean > -kInfinity;
    const uint32_t is_nan = raw != raw, is_infinite = raw == kInfinity;
    const uint32_t unusable = (raw == -kInfinity) | ((is_nan | is_infinite) & (gathered ^ 1u));
    const float other = unusable ? clean : raw;
    const float score = contrast(clean, other, p.weight, p.one_plus_weight);
    const uint32_t overflow = !(score < kInfinity);
    met |= gathered & is_nan ? kMetNanNoised : 0u;
    met |= gathered & is_infinite ? kMetInfiniteNoised : 0u;
    met |= gathered & overflow ? kMetOverflow : 0u;
    scores[i] = overflow ? -kInfinity : score;
  }
  return met;
}

// Groups where every noised logit and score is an ordinary number need none of the rules.
uint32_t contrast_rows(const float* z, const float* noised, int64_t n, const ContrastParams& params, float* scores) {
  const ContrastParams p = params;
  uint32_t met = 0;
  for (int64_t begin = 0; begin < n; begin += kGroup) {
    const int64_t size = n - begin < kGroup ? n - begin : kGroup;
    uint32_t unusual = 0;
#pragma omp simd reduction(| : unusual)
    for (int64_t i = begin; i < begin + size; ++i) {
      const float score = p.one_plus_weight * z[i] - p.weight * noised[i];
      const float difference = score - noised[i];  // no finite number unless both are
      unusual |= !(difference - difference == 0.0f);
      scores[i] = score;
    }
    if (unusual) met |= contrast_carefully(z + begin, noised + begin, size, p, scores + begin);
  }
  return met;
}

float maximum(const float* x, int64_t n) {
  float lanes[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = -kInfinity;
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = larger(x[i + lane], lanes[lane]);
  }
  for (int64_t i = whole; i < n; ++i) lanes[i - whole] = larger(x[i], lanes[i - whole]);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] = larger(lanes[lane], lanes[lane + width]);
  }
  return lanes[0];
}

void group_maxima(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kGroup) *out++ = maximum(x + i, n - i < kGroup ? n - i : kGroup);
}

int64_t find(const float* x, int64_t n, float value) {
  for (int64_t i = 0; i < n; i += kGroup) {
    const int64_t size = n - i < kGroup ? n - i : kGroup;
    uint32_t any = 0;
    for (int64_t j = 0; j < size; ++j) any |= x[i + j] == value;
    for (int64_t j = 0; any && j < size; ++j) {
      if (x[i + j] == value) return i + j;
    }
  }
  return -1;
}

int64_t count_finite(const float* x, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kGroup) {
    int32_t in_group = 0;
    for (int64_t j = i; j < (n - i < kGroup ? n : i + kGroup); ++j) in_group += x[j] > -kInfinity;
    count += in_group;
  }
  return count;
}

void divide(float* x, int64_t n, float divisor) {
  for (int64_t i = 0; i < n; ++i) x[i] /= divisor;
}

// ---- exponentials of numbers <= 0 ----

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

double mass(const float* x, int64_t n, float best) {
  const double top = best;
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += exponential(x[i] - top);
  return sum;
}

double rough_mass(const float* x, int64_t n, float best) {
  double sum = 0;
  for (int64_t i = 0; i < n; i += kGroup) {
    const int64_t end = n - i < kGroup ? n : i + kGroup;
    float in_group = 0;
#pragma omp simd reduction(+ : in_group)
    for (int64_t j = i; j < end; ++j) in_group += exponential(x[j] - best);
    sum += in_group;
  }
  return sum;
}

void weights(const float* x, int64_t n, float best, double* out) {
  const double top = best;
  for (int64_t i = 0; i < n; ++i) out[i] = exponential(x[i] - top);
}

// ---- compaction ----

int64_t keep_at_least(const Scored& from, float floor, Scored to) {
  constexpr int64_t kBlock = 64;
  int64_t size = 0;
  for (int64_t i = 0; i < from.size; i += kBlock) {
    const int64_t end = from.size - i < kBlock ? from.size : i + kBlock;
    uint32_t any = 0;
    for (int64_t j = i; j < end; ++j) any |= from.scores[j] >= floor;
    if (!any) continue;
    for (int64_t j = i; j < end; ++j) {
      const float score = from.scores[j];
      const int32_t token = from.tokens ? from.tokens[j] : static_cast<int32_t>(j);
      to.scores[size] = score;
      to.tokens[size] = token;
      size += score >= floor;
    }
  }
  return size;
}

// ---- the race ----

// 64 neighbouring tokens from a multiple of 64 on: 16 calls of the cipher side by side.
inline void bits_of_range(int64_t first, const DrawKey& key, uint32_t* bits) {
  const uint32_t first_block = philox_block(static_cast<uint32_t>(first));
  uint32_t words[4][16];
  for (int call = 0; call < 16; ++call) {
    const PhiloxWords result = philox(first_block + static_cast<uint32_t>(call), key);
    for (int word = 0; word < 4; ++word) words[word][call] = result.word[word];
  }
  for (int group = 0; group < 2; ++group) {
    for (int word = 0; word < 4; ++word) memcpy(bits + 32 * group + 8 * word, words[word] + 8 * group, 32);
  }
}

inline void bits_of_tokens(const int32_t* tokens, int64_t n, const DrawKey& key, uint32_t* bits) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t token = static_cast<uint32_t>(tokens[i]);
    const PhiloxWords result = philox(philox_block(token), key);
    const uint32_t word = philox_word(token);
    const uint32_t low = word & 1 ? result.word[1] : result.word[0];
    const uint32_t high = word & 1 ? result.word[3] : result.word[2];
    bits[i] = word & 2 ? high : low;
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
        if (!(bounds[j] > limit)) continue;
        const double value = scores[j] + gumbel(bits[j]);
        const int64_t token = scored.tokens ? scored.tokens[begin + j] : begin + j;
        if (value > best.value || (value == best.value && token < best.token)) best = {value, token, scores[j]};
      }
    }
  }
  return best;
}

int32_t largest_integer(const int32_t* x, int64_t n) {
  int32_t largest = INT32_MIN;
  for (int64_t i = 0; i < n; ++i) largest = larger(largest, x[i]);
  return largest;
}

}  // namespace

extern const Loops kLoops;
const Loops kLoops = {SAFECODE_TEXT(SAFECODE_ISA), scan,        start_scan, widen, convert, contrast_rows, maximum,
                      group_maxima,                find,        count_finite, divide,      mass,          rough_mass,
                      weights,                     keep_at_least, race,     largest_integer};

}  // namespace safecode::cpu::SAFECODE_ISA
