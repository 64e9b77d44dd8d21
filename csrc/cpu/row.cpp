#include "row.h"

#include <algorithm>

#include "gather.h"
#include "select.h"

namespace safecode::cpu {
namespace {

RowResult failed(Status status) { return {0, -kInfinity, 0, status}; }

// Calls function(i) for every candidate in the mask.
template <class Function>
void for_each_refusal(const Candidates& all, const Mask& mask, Function&& function) {
  if (!all.tokens) {
    for (int64_t i = 0; i < mask.size; ++i) function(mask.tokens[i]);
  } else if (all.refusals) {
    for (int64_t i = all.size - all.refusals; i < all.size; ++i) function(i);
  } else {
    for (int64_t i = 0; i < all.size; ++i) {
      if (in_mask(mask.words, all.tokens[i])) function(i);
    }
  }
}

// Adds the bias to the refusal tokens in scope, on both sides of the cut. False if a score became +inf.
bool add_bias(const Candidates& all, const RowInput& input, float threshold) {
  const float bias = input.bias();
  bool overflow = false;
  for_each_refusal(all, *input.mask, [&](int64_t i) {
    if (!(all.scores[i] >= threshold)) return;
    all.scores[i] += bias;
    if (all.clean) all.clean[i] += bias;
    overflow |= !(all.scores[i] < kInfinity);
  });
  return !overflow;
}

// Keeps candidates that have a score and pass the cut among those that have one.
Scored cut(const Candidates& all, const RowParams& params, Workspace& work) {
  float best = -kInfinity;
  for (int64_t i = 0; i < all.size; ++i) {
    if (all.scores[i] > -kInfinity) best = std::max(best, all.clean[i]);
  }
  const float floor = best + params.log_beta;
  Scored kept{all.scores, all.tokens ? all.tokens : room(work.tokens, all.size), 0};
  for (int64_t i = 0; i < all.size; ++i) {
    const bool stays = all.scores[i] > -kInfinity && all.clean[i] >= floor;
    kept.scores[kept.size] = all.scores[i];
    kept.tokens[kept.size] = all.tokens ? all.tokens[i] : static_cast<int32_t>(i);
    kept.size += stays;
  }
  return kept;
}

}  // namespace

RowResult decode_row(const RowInput& input, const DrawKey* key, Workspace& work) {
  const RowParams& params = input.params;
  const Candidates all = gather(input, work);
  if (all.status != Status::kOk) return failed(all.status);
  const bool biased = input.bias() != 0;
  if (biased) {
    const float threshold = kth_best(all.scores, all.size, params.scope, work.spare);
    if (!add_bias(all, input, threshold)) return failed(Status::kInfinite);
  }
  Scored scored{all.scores, all.tokens, all.size};
  // With beta 0 only a bias that overflows makes the cut more than a formality.
  const bool needs_cut = input.is_dense() ? all.clean && biased : biased || input.uses_noised();
  if (needs_cut) scored = cut(all, params, work);
  return choose(scored, params, params.greedy ? nullptr : key, work);
}

RowResult draw_row(const LogitRow& scores, const DrawKey* key, Workspace& work) {
  float* x = room(work.scores, scores.size);
  const Status status = status_of_best(loops().largest_logit(scores, 0, scores.size));
  if (status != Status::kOk) return failed(status);
  loops().convert(scores, 0, scores.size, x);
  return finish({x, nullptr, scores.size}, key);
}

}  // namespace safecode::cpu
