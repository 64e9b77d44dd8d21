// Rows with few candidates: one thread each, from its two logits to its score.
#pragma once

#include "choose.cuh"

namespace safecode::cuda {

// Whether a candidate's score is among the K best of all candidates or ties with the K-th. `size` candidates, the
// scores are exchanged through `scores`.
__device__ inline bool is_in_scope(float score, int size, int64_t scope, float* scores) {
  if (static_cast<int>(threadIdx.x) < size) scores[threadIdx.x] = score;
  __syncthreads();
  int better = 0;
  for (int i = 0; i < size; ++i) better += scores[i] > score;
  __syncthreads();
  return better < scope;
}

// Contrast, bias, cut and temperature of the candidates in shared memory, then the choice.
__device__ inline RowResult decode_candidates() {
  const Row& row = shared().row;
  const Candidates& all = shared().candidates;
  const bool is_candidate = static_cast<int>(threadIdx.x) < all.size;
  const uint32_t marked = is_candidate ? all.token[threadIdx.x] : 0;
  const float clean = is_candidate ? all.clean[threadIdx.x] : -kInfinity;
  uint32_t met = 0;
  float score = clean;
  if (is_candidate && row.contrasts) {
    score = contrast_by_rules(clean, all.noised[threadIdx.x], 1, row.params.weight, row.params.one_plus_weight, met);
  }
  float biased_clean = clean;
  const bool in_scope = !row.is_scoped() || is_in_scope(score, all.size, row.params.scope, shared().candidates.noised);
  if (marked & kRefusal && in_scope) {
    score += row.bias;
    biased_clean += row.bias;
    if (!(score < kInfinity)) met |= kMetOverflow;
  }
  met = reduce_block(met, AnyBit());
  if (met) return failed(status_of_contrast(met));
  const bool is_allowed = score > -kInfinity;
  const float best = reduce_block(is_allowed ? biased_clean : -kInfinity, Larger());
  const bool is_kept = is_allowed && biased_clean >= row.cut(best);
  return choose(is_kept ? score / row.params.temperature : -kInfinity, marked & ~kRefusal, all.size);
}

}  // namespace safecode::cuda
