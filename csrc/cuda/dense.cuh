// Rows that are scored as a whole, by all blocks of their group: with beta 0, with more candidates than a block has
// threads, and in scores mode.
#pragma once

#include "search.cuh"

namespace safecode::cuda {

// Begins the work on a whole row; lifted logits from `floor` on are gathered. Ends with a barrier.
template <class Group, class Format>
__device__ inline void begin_dense(const Task& task, float floor, float* scores) {
  if (threadIdx.x == 0) {
    const Row& row = shared().row;
    Dense& dense = shared().dense;
    dense.part = Part::of(row.vocab_size, Group::rank(), Group::size());
    dense.clean = Logits<Format>::of_row(task.clean, row.index).data;
    dense.noised = Logits<Format>::of_row(task.noised, row.index).data;
    dense.raise = row.gather().raise;
    dense.floor = floor;
    dense.scope_limit = descending(-kInfinity);
    dense.scores = scores;
    dense.order = TokenOrder::of(row.vocab_size);
  }
  __syncthreads();
}

template <class Format>
__device__ inline float clean_logit(uint32_t token) {
  return Logits<Format>{static_cast<const typename Format::Bits*>(shared().dense.clean)}.at(token);
}

template <class Format>
__device__ inline float noised_logit(uint32_t token) {
  return Logits<Format>{static_cast<const typename Format::Bits*>(shared().dense.noised)}.at(token);
}

// The logit that the gathering compares.
__device__ inline float lifted_logit(uint32_t token, float clean) {
  const Row& row = shared().row;
  return row.lift != 0 ? row.lifted(clean, in_mask(row.words, token)) : clean;
}

__device__ inline bool is_candidate(uint32_t token, float clean) {
  return clean > -kInfinity && is_gathered(lifted_logit(token, clean), shared().dense.raise, shared().dense.floor);
}

// What a pass over the row finds.
struct Totals {
  float best;          // largest clean logit, NaN if there is one
  float best_allowed;  // largest biased clean logit of the tokens that have a score
  float best_score;
  uint32_t met;
};

struct TotalsOfBoth {
  __device__ Totals operator()(const Totals& a, const Totals& b) const {
    return {max_nan(a.best, b.best), a.best_allowed > b.best_allowed ? a.best_allowed : b.best_allowed,
            a.best_score > b.best_score ? a.best_score : b.best_score, a.met | b.met};
  }
};

constexpr Totals kNoTotals = {-kInfinity, -kInfinity, -kInfinity, 0};

struct Biased {
  float score, clean;
};

// The score of one token before the bias. kAllTokens (scores mode): also of tokens that are no candidates.
template <class Format, bool kAllTokens>
__device__ inline float raw_score(uint32_t token, float clean, uint32_t& met) {
  const bool counts = is_candidate(token, clean);
  if (!kAllTokens && !counts) return -kInfinity;
  const Row& row = shared().row;
  if (!row.contrasts) return clean;
  return contrast_by_rules(clean, noised_logit<Format>(token), counts, row.params.weight,
                           row.params.one_plus_weight, met);
}

__device__ inline Biased add_bias(uint32_t token, float clean, float score, uint32_t& met) {
  const Row& row = shared().row;
  if (row.bias == 0 || !in_mask(row.words, token) || descending(score) > shared().dense.scope_limit) {
    return {score, clean};
  }
  Biased result{score + row.bias, clean + row.bias};
  if (!(result.score < kInfinity)) {
    result.score = -kInfinity;
    if (is_candidate(token, clean)) met |= kMetOverflow;
  }
  return result;
}

__device__ inline void account(const Biased& biased, Totals& totals) {
  if (!(biased.score > -kInfinity)) return;
  totals.best_score = biased.score > totals.best_score ? biased.score : totals.best_score;
  totals.best_allowed = biased.clean > totals.best_allowed ? biased.clean : totals.best_allowed;
}

// The descending key of the K-th best score among the candidates; the raw scores are written.
template <class Group, class Format, bool kAllTokens>
__device__ uint32_t scope_limit() {
  const KeyRange finite{descending(kLargestFloat), descending(-kLargestFloat)};
  const auto key_of = [](uint32_t token) -> uint64_t {
    const float score = shared().dense.scores[token];
    if (!(score > -kInfinity) || (kAllTokens && !is_candidate(token, clean_logit<Format>(token)))) return kNoKey;
    return descending(score);
  };
  // Exact, since the limit is also compared with scores of tokens that are none.
  const uint64_t last = last_kept<Group, false, true>(finite, count_of(shared().row.params.scope), key_of, count_one);
  return last == kNoKey ? descending(-kInfinity) : static_cast<uint32_t>(last);
}

// The passes that need every token before the next may begin: raw scores, the scope of the bias, and what the cut has
// to know. If `in_one_pass`, what is written is already biased and divided by the temperature.
template <class Group, class Format, bool kAllTokens>
__device__ Status score_row(bool in_one_pass, Totals& totals) {
  float* scores = shared().dense.scores;
  const bool is_scoped = shared().row.is_scoped();
  totals = kNoTotals;
  for_each_token([&](uint32_t token) {
    const float clean = clean_logit<Format>(token);
    totals.best = max_nan(totals.best, clean);
    float score = raw_score<Format, kAllTokens>(token, clean, totals.met);
    if (!is_scoped) {
      const Biased biased = add_bias(token, clean, score, totals.met);
      account(biased, totals);
      if (in_one_pass) score = biased.score / shared().row.params.temperature;
    }
    scores[token] = score;
  });
  totals = reduce<Group>(totals, TotalsOfBoth());
  Status status = status_of_best(totals.best);
  if (status == Status::kOk) status = status_of_contrast(totals.met);
  if (status != Status::kOk || !is_scoped) return status;

  const uint32_t limit = scope_limit<Group, Format, kAllTokens>();
  if (threadIdx.x == 0) shared().dense.scope_limit = limit;
  __syncthreads();
  for_each_token([&](uint32_t token) {
    account(add_bias(token, clean_logit<Format>(token), scores[token], totals.met), totals);
  });
  totals = reduce<Group>(totals, TotalsOfBoth());
  return status_of_contrast(totals.met);
}

// Writes every token's score divided by the temperature, -inf where it is excluded, and sets their maximum. Ends with a
// barrier.
template <class Group, class Format>
__device__ Status write_scores() {
  const Row& row = shared().row;
  const bool in_one_pass = row.is_dense() && !row.is_scoped();
  Totals totals;
  const Status status = score_row<Group, Format, false>(in_one_pass, totals);
  float best = totals.best_score / row.params.temperature;
  if (status == Status::kOk && !in_one_pass) {
    float* scores = shared().dense.scores;
    const float floor = row.cut(totals.best_allowed);
    best = -kInfinity;
    for_each_token([&](uint32_t token) {
      const Biased biased = add_bias(token, clean_logit<Format>(token), scores[token], totals.met);
      const bool is_kept = biased.score > -kInfinity && biased.clean >= floor;
      const float score = is_kept ? biased.score / row.params.temperature : -kInfinity;
      scores[token] = score;
      best = score > best ? score : best;
    });
    best = reduce<Group>(best, Larger());
  }
  if (threadIdx.x == 0) shared().dense.best = best;
  __syncthreads();
  return status;
}

// Scores mode: every token's score, biased clean logit and whether it passes the cut, [V] each.
template <class Group, class Format>
__device__ Status write_all_scores(float* biased_clean, uint8_t* keep) {
  const Gather gather = shared().row.gather();
  float best = -kInfinity;
  for_each_token([&](uint32_t token) { best = max_nan(best, lifted_logit(token, clean_logit<Format>(token))); });
  best = reduce<Group>(best, LargerOrNan());
  if (threadIdx.x == 0) shared().dense.floor = gather.floor(best);
  __syncthreads();
  Totals totals;
  const Status status = score_row<Group, Format, true>(false, totals);
  float* scores = shared().dense.scores;
  if (status != Status::kOk) {
    for_each_token([&](uint32_t token) {
      scores[token] = biased_clean[token] = -kInfinity;
      keep[token] = 0;
    });
    return status;
  }
  const float floor = shared().row.cut(totals.best_allowed);
  for_each_token([&](uint32_t token) {
    const Biased biased = add_bias(token, clean_logit<Format>(token), scores[token], totals.met);
    scores[token] = biased.score;
    biased_clean[token] = biased.clean;
    keep[token] = biased.score > -kInfinity && biased.clean >= floor;
  });
  return totals.best_score > -kInfinity ? Status::kOk : Status::kNothingFinite;
}

}  // namespace safecode::cuda
