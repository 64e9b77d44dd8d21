// One row of each of the three calls.
#pragma once

#include "loops.h"
#include "workspace.h"

namespace safecode::cpu {

// A set of refusal tokens: as words, for a look at one token, and as ascending ids.
struct Mask {
  const int32_t* words;
  const int32_t* tokens;
  int64_t size;
};

// Inputs of a row; noised.data null: no contrast; mask null: no bias.
struct RowInput {
  LogitRow clean;
  LogitRow noised;
  RowParams params;
  const Mask* mask;

  bool uses_noised() const { return noised.data && params.weight != 0; }
  float bias() const { return mask ? params.bias : 0.0f; }
  bool is_dense() const { return params.log_beta == -kInfinity; }
};

// Scores, cuts, filters and draws one token; key null is greedy.
RowResult decode_row(const RowInput& input, const DrawKey* key, Workspace& work);

// Writes every token's score, biased clean logit and whether it passes the cut.
Status score_row(const RowInput& input, float* scores, float* biased_clean, uint8_t* keep, Workspace& work);

// Draws from processed scores; key null takes the best.
RowResult draw_row(const LogitRow& scores, const DrawKey* key, Workspace& work);

}  // namespace safecode::cpu
