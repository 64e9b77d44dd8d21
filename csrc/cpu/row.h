// One row of each of the three calls.
#pragma once

#include "loops.h"
#include "workspace.h"

namespace safecode::cpu {

// Inputs of a row; noised.data null: no contrast; words null: no mask.
struct RowInput {
  LogitRow clean;
  LogitRow noised;
  RowParams params;
  const int32_t* words;
};

// Scores, cuts, filters and draws one token; key null is greedy.
RowResult decode_row(const RowInput& input, const DrawKey* key, Workspace& work);

// Writes every token's score, biased clean logit and whether it passes the cut.
Status score_row(const RowInput& input, float* scores, float* biased_clean, uint8_t* keep, Workspace& work);

// Draws from processed scores; key null takes the best.
RowResult draw_row(const LogitRow& scores, const DrawKey* key, Workspace& work);

}  // namespace safecode::cpu
