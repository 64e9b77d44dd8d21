// From the scores of the kept tokens to one of them.
#pragma once

#include "loops.h"
#include "workspace.h"

namespace safecode::cpu {

// The k-th largest value; -inf for k = 0 or k > n. `spare` is scratch.
float kth_best(float* x, int64_t n, int64_t k, std::vector<float>& spare);

// Divides by the temperature, applies top_k, top_p and min_p, then draws or takes the best. `scored` lies in `work`
// (scores, and tokens or null); key null is greedy. A score of -inf is excluded.
RowResult choose(Scored scored, const RowParams& params, const DrawKey* key, Workspace& work);

// The last part of it: draws among the finite scores.
RowResult finish(const Scored& scored, const DrawKey* key);

}  // namespace safecode::cpu
