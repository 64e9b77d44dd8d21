// Loops over every token of a row: fp32 copies, contrast, maxima, masses, compaction.
#include "exponential.h"
#include "formats.h"

namespace safecode::cpu::SAFECODE_ISA {
namespace {

constexpr int64_t kSpan = 256;  // tokens that are treated before something is looked at

template <class Format>
float largest_format(const void* data, int64_t begin, int64_t n) {
  const auto* logits = static_cast<const typename Format::Stored*>(data) + begin;
  Lanes<Format> lanes;
  Magnitudes<Format> magnitudes = {};
  for (auto& lane : lanes) lane = excluded_key<Format>();
  const int64_t whole = n - n % Format::kLanes;
  for (int64_t i = 0; i < whole; i += Format::kLanes) take<Format>(logits + i, lanes, magnitudes);
  take_some<Format>(logits + whole, n - whole, lanes, magnitudes);
  return largest<Format>(lanes, Format::kLanes, magnitudes);
}

template <class Format>
void convert_format(const void* data, int64_t begin, int64_t n, float* out) {
  const auto* logits = static_cast<const typename Format::Stored*>(data) + begin;
  for (int64_t i = 0; i < n; ++i) out[i] = Format::value(logits[i]);
}

// With every rule for logits that are not finite.
uint32_t contrast_carefully(const float* z, const float* noised, int64_t n, const ContrastParams& p, float* scores) {
  uint32_t met = 0;
#pragma omp simd reduction(| : met)
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t is_candidate = p.all_are_candidates && z[i] > -kInfinity;
    uint32_t met_here = 0;
    scores[i] = contrast_by_rules(z[i], noised[i], is_candidate, p.weight, p.one_plus_weight, met_here);
    met |= met_here;
  }
  return met;
}

// What is left of values side by side, then of these.
template <class Pick>
inline float extreme(const float* x, int64_t n, float none, Pick&& pick) {
  float lanes[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = none;
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = pick(x[i + lane], lanes[lane]);
  }
  for (int64_t i = whole; i < n; ++i) lanes[i - whole] = pick(x[i], lanes[i - whole]);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] = pick(lanes[lane], lanes[lane + width]);
  }
  return lanes[0];
}

// The largest of kGroup values, by folding halves onto each other: for so few, `maximum` takes 1.5 times as long or more.
inline float group_maximum(const float* x) {
  constexpr int64_t kHalf = kGroup / 2;
  float top[kHalf];
  for (int64_t i = 0; i < kHalf; ++i) top[i] = larger(x[i], x[i + kHalf]);
  for (int64_t width = kHalf / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) top[i] = larger(top[i], top[i + width]);
  }
  return top[0];
}

// Appends scores [begin, end) that are at least the floor: few, so that most looks at several find none.
inline void append(const Scored& from, int64_t begin, int64_t end, float floor, Scored& to) {
  constexpr int64_t kLook = 64;
  int64_t size = to.size;
  for (int64_t i = begin; i < end; i += kLook) {
    const int64_t stop = end - i < kLook ? end : i + kLook;
    uint32_t any = 0;
    for (int64_t j = i; j < stop; ++j) any |= from.scores[j] >= floor;
    if (!any) continue;
    for (int64_t j = i; j < stop; ++j) {
      const float score = from.scores[j];
      const int32_t token = from.tokens ? from.tokens[j] : static_cast<int32_t>(j);
      to.scores[size] = score;
      if (to.tokens) to.tokens[size] = token;
      size += score >= floor;
    }
  }
  to.size = size;
}

}  // namespace

float largest_logit(const LogitRow& row, int64_t begin, int64_t n) {
  return with_format(row.dtype, [&](auto format) { return largest_format<decltype(format)>(row.data, begin, n); });
}

void convert(const LogitRow& row, int64_t begin, int64_t n, float* out) {
  with_format(row.dtype, [&](auto format) { convert_format<decltype(format)>(row.data, begin, n, out); });
}

void read(const LogitRow& row, const int32_t* tokens, int64_t n, float* out) {
  with_format(row.dtype, [&](auto format) {
    using Format = decltype(format);
    const auto* logits = static_cast<const typename Format::Stored*>(row.data);
    for (int64_t i = 0; i < n; ++i) out[i] = Format::value(logits[tokens[i]]);
  });
}

// Groups where every noised logit and score is an ordinary number need none of the rules.
uint32_t contrast_rows(const float* z, const float* noised, int64_t n, const ContrastParams& params, float* scores) {
  const ContrastParams p = params;
  uint32_t met = 0;
  for (int64_t begin = 0; begin < n; begin += kSpan) {
    const int64_t size = n - begin < kSpan ? n - begin : kSpan;
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
  return extreme(x, n, -kInfinity, [](float a, float b) { return larger(a, b); });
}

void group_maxima(const float* x, int64_t n, float* out) {
  for (; n >= kGroup; n -= kGroup, x += kGroup) *out++ = group_maximum(x);
  if (n > 0) *out = maximum(x, n);
}

int64_t find(const float* x, int64_t n, float value) {
  for (int64_t i = 0; i < n; i += kSpan) {
    const int64_t size = n - i < kSpan ? n - i : kSpan;
    uint32_t any = 0;
    for (int64_t j = 0; j < size; ++j) any |= x[i + j] == value;
    for (int64_t j = 0; any && j < size; ++j) {
      if (x[i + j] == value) return i + j;
    }
  }
  return -1;
}

// Where the smallest is above -inf, all are.
Summary summarise(const float* x, int64_t n) {
  Summary all{-kInfinity, 0};
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t end = n - i < kBlock ? n : i + kBlock;
    all.largest = larger(maximum(x + i, end - i), all.largest);
    const float least = extreme(x + i, end - i, kInfinity, [](float a, float b) { return smaller(a, b); });
    if (least > -kInfinity) {
      all.n_finite += end - i;
    } else {
      for (int64_t j = i; j < end; ++j) all.n_finite += x[j] > -kInfinity;
    }
  }
  return all;
}

void divide(float* x, int64_t n, float divisor) {
  for (int64_t i = 0; i < n; ++i) x[i] /= divisor;
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
  for (int64_t i = 0; i < n; i += kSpan) {
    const int64_t end = n - i < kSpan ? n : i + kSpan;
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

int64_t keep_at_least(const Scored& from, float floor, Scored to) {
  to.size = 0;
  append(from, 0, from.size, floor, to);
  return to.size;
}

int64_t keep_of_groups(const Scored& from, const float* maxima, float floor, Scored to) {
  to.size = 0;
  for (int64_t i = 0; i < from.size; i += kGroup, ++maxima) {
    if (*maxima >= floor) append(from, i, from.size - i < kGroup ? from.size : i + kGroup, floor, to);
  }
  return to.size;
}

int32_t largest_integer(const int32_t* x, int64_t n) {
  int32_t largest = INT32_MIN;
  for (int64_t i = 0; i < n; ++i) largest = larger(largest, x[i]);
  return largest;
}

}  // namespace safecode::cpu::SAFECODE_ISA
