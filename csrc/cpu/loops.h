// The loops over many tokens, compiled once per instruction set (loops.cpp); everything else is compiled once.
#pragma once

#include <cstdint>

#include "../decode_step.h"
#include "../row_math.h"

namespace safecode::cpu {

constexpr int64_t kScanChunk = 512;   // logits between two looks at the running threshold
constexpr int64_t kGroup = 256;       // tokens whose largest score stands for them in searches
constexpr int64_t kRaceChunk = 512;   // tokens drawn at a time: bits and bounds stay in the first cache

// The running state of the scan for candidates.
struct Scan {
  Gather gather;
  float best;          // largest logit so far, -inf at the start
  int32_t least_rank;  // smallest rank (see loops.cpp) that is gathered now
  bool found_nan;
  int32_t* tokens;  // candidates so far: a superset, since the threshold only rises
  float* logits;
  int64_t size;
  int64_t capacity;
};

// What the contrast met at gathered tokens.
constexpr uint32_t kMetNanNoised = 1;
constexpr uint32_t kMetInfiniteNoised = 2;
constexpr uint32_t kMetOverflow = 4;

struct ContrastParams {
  float weight;
  float one_plus_weight;
  float raise;
  float floor;
};

struct RaceBest {
  double value;
  int64_t token;
  float score;
};

// scores[0..n) and their tokens; tokens null: token i is score i.
struct Scored {
  float* scores;
  int32_t* tokens;
  int64_t size;
};

struct Loops {
  const char* name;

  // Scans logits [begin, row.size) into `scan`; returns where it stopped: at the end, or where the buffer might overflow.
  int64_t (*scan)(const LogitRow& row, int64_t begin, Scan& scan);
  // Sets the scan to its start, for logits of this dtype.
  void (*start_scan)(DType dtype, Scan& scan);
  // Copies n logits from `begin` on as fp32; returns their maximum, NaN if any is NaN.
  float (*widen)(const LogitRow& row, int64_t begin, int64_t n, float* out);
  void (*convert)(const LogitRow& row, int64_t begin, int64_t n, float* out);  // the same without the maximum
  // scores = contrast of z and noised. Not gathered: a noised logit that is not finite contributes nothing. A score that
  // is no number below +inf becomes -inf. Returns what it met at gathered tokens.
  uint32_t (*contrast)(const float* z, const float* noised, int64_t n, const ContrastParams& params, float* scores);
  // Largest value; -inf for n = 0. The values hold no NaN.
  float (*maximum)(const float* x, int64_t n);
  // Largest of each group of kGroup values.
  void (*group_maxima)(const float* x, int64_t n, float* out);
  // First place of `value`.
  int64_t (*find)(const float* x, int64_t n, float value);
  int64_t (*count_finite)(const float* x, int64_t n);
  void (*divide)(float* x, int64_t n, float divisor);
  // Sum of exp(x - best), x <= best: in double, and in single precision for what is only reported.
  double (*mass)(const float* x, int64_t n, float best);
  double (*rough_mass)(const float* x, int64_t n, float best);
  void (*weights)(const float* x, int64_t n, float best, double* out);
  // Keeps what is at least the floor, in order; `to` may be `from`. Returns the new size.
  int64_t (*keep_at_least)(const Scored& from, float floor, Scored to);
  // The race x + gumbel over all tokens.
  RaceBest (*race)(const Scored& scored, const DrawKey& key);
  // For measuring the memory: the largest of n integers.
  int32_t (*largest_integer)(const int32_t* x, int64_t n);
};

// The table for the processor at hand.
const Loops& loops();

}  // namespace safecode::cpu
