// The scores of every token of a row, for callers that run a processor list before they draw.
#include <algorithm>

#include "gather.h"
#include "select.h"

namespace safecode::cpu {
namespace {

// Whether a token counts as a candidate: what its noised logit and its score must then satisfy is a status of the row.
struct IsCandidate {
  const RowInput& input;
  const float* z;
  float raise;  // with a scope: the same for every token
  float floor;

  bool operator()(int64_t i) const {
    if (!(z[i] > -kInfinity)) return false;
    const bool raised = input.bias() != 0 && input.params.scope == 0 && in_mask(input.mask->words, i);
    return z[i] + (raised ? input.bias() : raise) >= floor;
  }
};

IsCandidate candidates(const RowInput& input, const float* z, float best) {
  const RowParams& params = input.params;
  const float bias = input.bias();
  if (bias == 0 || params.scope > 0) {
    const Gather gather{std::max(bias, 0.0f), std::min(bias, 0.0f), params.log_beta};
    return {input, z, gather.raise, gather.floor(best)};
  }
  float top = -kInfinity;  // of z + b
  if (bias > 0) {
    top = best;
  } else {
    for (int64_t i = 0; i < input.clean.size; ++i) {
      if (z[i] > top && !in_mask(input.mask->words, i)) top = z[i];
    }
  }
  for (int64_t i = 0; i < input.mask->size; ++i) top = std::max(top, z[input.mask->tokens[i]] + bias);
  return {input, z, 0.0f, Gather{0.0f, 0.0f, params.log_beta}.floor(top)};
}

// Contrast of every token. What only a candidate must not have is looked for at the candidates alone.
Status contrast(const RowInput& input, const float* z, const IsCandidate& is_candidate, float* scores, Workspace& work) {
  const int64_t size = input.clean.size;
  if (!input.uses_noised()) {
    std::copy(z, z + size, scores);
    return Status::kOk;
  }
  float* noised = room(work.noised, size);
  loops().convert(input.noised, 0, size, noised);
  const ContrastParams forgiving{input.params.weight, input.params.one_plus_weight, false};
  loops().contrast(z, noised, size, forgiving, scores);
  bool infinite = false;
  for (int64_t i = 0; i < size; ++i) {
    const bool unusual = !(noised[i] - noised[i] == 0.0f) || scores[i] == -kInfinity;
    if (!unusual || !is_candidate(i)) continue;
    if (noised[i] != noised[i]) return Status::kNanNoised;
    const float other = noised[i] == -kInfinity ? z[i] : noised[i];
    const float score = safecode::contrast(z[i], other, input.params.weight, input.params.one_plus_weight);
    infinite |= noised[i] == kInfinity || !(score < kInfinity);
  }
  return infinite ? Status::kInfinite : Status::kOk;
}

// Adds the bias to scores and clean logits. A candidate's score must not overflow; another's then excludes it.
Status add_bias(const RowInput& input, const IsCandidate& is_candidate, float* scores, float* clean, Workspace& work) {
  const float bias = input.bias();
  if (bias == 0) return Status::kOk;
  const int64_t size = input.clean.size;
  float threshold = -kInfinity;
  if (input.params.scope > 0) {
    float* among = room(work.scores, size);
    for (int64_t i = 0; i < size; ++i) among[i] = is_candidate(i) ? scores[i] : -kInfinity;
    threshold = kth_best(among, size, input.params.scope, work.spare);
  }
  Status status = Status::kOk;
  for (int64_t i = 0; i < input.mask->size; ++i) {
    const int64_t token = input.mask->tokens[i];
    if (!(scores[token] >= threshold)) continue;
    const bool candidate = is_candidate(token);
    scores[token] += bias;
    clean[token] += bias;
    if (scores[token] < kInfinity) continue;
    scores[token] = -kInfinity;
    if (candidate) status = Status::kInfinite;
  }
  return status;
}

Status try_score_row(const RowInput& input, float* scores, float* clean, uint8_t* keep, Workspace& work) {
  const int64_t size = input.clean.size;
  const float best = loops().largest_logit(input.clean, 0, size);
  Status status = status_of_best(best);
  if (status != Status::kOk) return status;
  loops().convert(input.clean, 0, size, clean);
  const IsCandidate is_candidate = candidates(input, clean, best);
  status = contrast(input, clean, is_candidate, scores, work);
  if (status != Status::kOk) return status;
  status = add_bias(input, is_candidate, scores, clean, work);
  if (status != Status::kOk) return status;
  float best_allowed = -kInfinity;
#pragma omp simd reduction(max : best_allowed)
  for (int64_t i = 0; i < size; ++i) {
    const float allowed = scores[i] > -kInfinity ? clean[i] : -kInfinity;
    best_allowed = allowed > best_allowed ? allowed : best_allowed;
  }
  const float floor = best_allowed + input.params.log_beta;
  for (int64_t i = 0; i < size; ++i) keep[i] = (scores[i] > -kInfinity) & (clean[i] >= floor);
  return loops().maximum(scores, size) == -kInfinity ? Status::kNothingFinite : Status::kOk;
}

}  // namespace

Status score_row(const RowInput& input, float* scores, float* biased_clean, uint8_t* keep, Workspace& work) {
  const Status status = try_score_row(input, scores, biased_clean, keep, work);
  if (status != Status::kOk) {
    std::fill(scores, scores + input.clean.size, -kInfinity);
    std::fill(biased_clean, biased_clean + input.clean.size, -kInfinity);
    std::fill(keep, keep + input.clean.size, uint8_t{0});
  }
  return status;
}

}  // namespace safecode::cpu
