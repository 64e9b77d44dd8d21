// Which tokens of a row are looked at, with their contrasted scores.
#pragma once

#include "row.h"

namespace safecode::cpu {

// Clean logits and scores side by side. tokens null: every token of the row, in order. clean null: the cut keeps every
// token that has a score. The last `refusals` ones are exactly those in the mask, if that is known (it is not where a
// bias scope or beta = 0 keeps all tokens).
struct Candidates {
  int32_t* tokens;
  float* clean;
  float* scores;
  int64_t size;
  int64_t refusals;
  Status status;
};

// With beta > 0: one pass over the clean row, the noised one read at the candidates only; with beta = 0 all of both.
Candidates gather(const RowInput& input, Workspace& work);

}  // namespace safecode::cpu
