// The loops over many tokens, compiled once per instruction set (loops.cpp); everything else is compiled once.
#pragma once

#include <cstdint>

#include "../decode_step.h"
#include "../row_math.h"

namespace safecode::cpu {

constexpr int64_t kScanChunk = 256;   // logits that share one set of maxima
constexpr int64_t kChunkLanes = 16;   // maxima of a chunk: lane l is the largest of its logits l, l + 16, l + 32, ...
constexpr int64_t kChunksAtOnce = 4;  // chunks whose maxima are compared with the threshold side by side
constexpr int64_t kBlock = 2048;      // tokens whose two logits and score lie in the first cache at a time
constexpr int64_t kGroup = 128;       // tokens whose largest score stands for them in searches

constexpr int64_t groups_of(int64_t n) { return (n + kGroup - 1) / kGroup; }
constexpr int64_t chunks_of(int64_t n) { return (n + kScanChunk - 1) / kScanChunk; }
// How many maxima `chunk_maxima` writes for n logits.
constexpr int64_t maxima_of(int64_t n) {
  return (chunks_of(n) + kChunksAtOnce - 1) / kChunksAtOnce * kChunksAtOnce * kChunkLanes;
}

constexpr int64_t kLargestRank = 4;  // bytes of a maximum at most

// Room for candidates, and how many there are.
struct Found {
  int32_t* tokens;
  float* logits;
  int64_t size;
  int64_t capacity;
};

struct ContrastParams {
  float weight;
  float one_plus_weight;
  bool all_are_candidates;  // a noised logit that is NaN or +inf is met, else it contributes no contrast
};

// Of some scores: the largest, and how many are above -inf.
struct Summary {
  float largest;
  int64_t n_finite;
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

  // Reads the row once: writes the maxima of its chunks (as the dtype's ranks, maxima_of(row.size) of them) and returns the largest logit, NaN if any is NaN.
  float (*chunk_maxima)(const LogitRow& row, void* maxima);
  // Appends the gathered tokens of the chunks from `chunk` on, `best` being the row's largest logit; reads only logits
  // behind maxima that are gathered. Returns where it stopped: at chunks_of(row.size) or beyond, or at a chunk for which
  // there might be no room.
  int64_t (*collect)(const LogitRow& row, const void* maxima, const Gather& gather, float best, int64_t chunk,
                     Found& found);
  // The largest of n logits from `begin` on, NaN if any is NaN.
  float (*largest_logit)(const LogitRow& row, int64_t begin, int64_t n);
  // Copies n logits from `begin` on as fp32.
  void (*convert)(const LogitRow& row, int64_t begin, int64_t n, float* out);
  // Reads the logits of n tokens as fp32.
  void (*read)(const LogitRow& row, const int32_t* tokens, int64_t n, float* out);
  // scores = contrast of z and noised; a score that is no number below +inf becomes -inf. Returns what it met.
  uint32_t (*contrast)(const float* z, const float* noised, int64_t n, const ContrastParams& params, float* scores);
  // Largest value; -inf for n = 0. The values hold no NaN.
  float (*maximum)(const float* x, int64_t n);
  // Largest of each group of kGroup values.
  void (*group_maxima)(const float* x, int64_t n, float* out);
  // First place of `value`.
  int64_t (*find)(const float* x, int64_t n, float value);
  Summary (*summarise)(const float* x, int64_t n);
  void (*divide)(float* x, int64_t n, float divisor);
  // Sum of exp(x - best), x <= best: in double, and in single precision for what is only reported.
  double (*mass)(const float* x, int64_t n, float best);
  double (*rough_mass)(const float* x, int64_t n, float best);
  void (*weights)(const float* x, int64_t n, float best, double* out);
  // Keeps what is at least the floor, in order; `to` may be `from`, or have no tokens. Returns the new size.
  int64_t (*keep_at_least)(const Scored& from, float floor, Scored to);
  // The same where the maxima of the groups are known.
  int64_t (*keep_of_groups)(const Scored& from, const float* maxima, float floor, Scored to);
  // The race x + gumbel over all tokens.
  RaceBest (*race)(const Scored& scored, const DrawKey& key);
  // For measuring the memory: the largest of n integers.
  int32_t (*largest_integer)(const int32_t* x, int64_t n);
};

// The table for the processor at hand.
const Loops& loops();

}  // namespace safecode::cpu
