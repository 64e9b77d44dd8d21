#include "select.h"

#include <algorithm>
#include <cmath>
#include <functional>

namespace safecode::cpu {
namespace {

constexpr int64_t kSortAtMost = 2048;  // so many candidates are sorted; more are thinned out first
constexpr int64_t kInsertAtMost = 32;  // up to here sorting by insertion is faster than std::sort
constexpr int64_t kBins = 1024;

RowResult failed(Status status) { return {0, -kInfinity, 0, status}; }

// Where kept scores go: the workspace, in place. The loops write one place beyond what they keep, never beyond what they
// have read.
Scored room_for_kept(const Scored& scored, Workspace& work) {
  return {scored.scores, scored.tokens ? scored.tokens : room(work.tokens, scored.size), 0};
}

// Keeps scores at least `floor`; scores of -inf never stay.
Scored keep_at_least(const Scored& scored, float floor, Workspace& work) {
  Scored kept = room_for_kept(scored, work);
  kept.size = loops().keep_at_least(scored, std::max(floor, -kLargestFloat), kept);
  return kept;
}

// Writes the maxima of groups, and returns the k-th largest of them: at least k scores reach it. `maxima` has room for
// twice the groups.
float floor_of_groups(const float* x, int64_t n, int64_t k, float* maxima) {
  const int64_t groups = groups_of(n);
  float* ordered = maxima + groups;
  loops().group_maxima(x, n, maxima);
  std::copy(maxima, maxima + groups, ordered);
  std::nth_element(ordered, ordered + k - 1, ordered + groups, std::greater<float>());
  return ordered[k - 1];
}

// A superset of what top_k keeps, found before the division by the temperature, so that only these few are divided.
// The division could make equal what differs by an ulp, so the floor lies lower; where it could also underflow, all stay.
Scored drop_hopeless(const Scored& scored, const RowParams& params, Workspace& work) {
  const int64_t groups = groups_of(scored.size);
  if (params.top_k > groups) return scored;
  float* maxima = room(work.spare, 2 * groups);
  const float floor = floor_of_groups(scored.scores, scored.size, params.top_k, maxima);
  const bool safe = params.temperature > 0x1p-10f && params.temperature < 0x1p10f && std::fabs(floor) > 1e-30f;
  if (!safe || floor == -kInfinity) return scored;
  Scored kept = room_for_kept(scored, work);
  kept.size = loops().keep_of_groups(scored, maxima, floor - std::fabs(floor) * 0x1p-20f, kept);
  return kept;
}

// Sorts by (score descending, token ascending). Few candidates are the rule, and nearly sorted ones common.
void sort_candidates(Scored& scored, Workspace& work) {
  const auto goes_before = [](const Candidate& a, const Candidate& b) {
    return a.score > b.score || (a.score == b.score && a.token < b.token);
  };
  Candidate* sorted = room(work.candidates, scored.size);
  if (scored.size <= kInsertAtMost) {
    for (int64_t i = 0; i < scored.size; ++i) {
      const Candidate next{scored.scores[i], scored.tokens[i]};
      int64_t place = i;
      for (; place > 0 && goes_before(next, sorted[place - 1]); --place) sorted[place] = sorted[place - 1];
      sorted[place] = next;
    }
  } else {
    for (int64_t i = 0; i < scored.size; ++i) sorted[i] = {scored.scores[i], scored.tokens[i]};
    std::sort(sorted, sorted + scored.size, goes_before);
  }
  for (int64_t i = 0; i < scored.size; ++i) {
    scored.scores[i] = sorted[i].score;
    scored.tokens[i] = sorted[i].token;
  }
}

// How many of the sorted candidates stay while the mass before each, `before` for the first, is below top_p.
int64_t count_nucleus(const double* weight, int64_t n, double before, double total, double top_p) {
  int64_t size = 0;
  while (size < n && before < top_p) before += weight[size++] / total;
  return size;
}

// top_k, top_p and min_p of candidates that are few enough to sort, after the division by the temperature: each keeps a
// beginning of them. Then the draw.
RowResult choose_sorted(Scored scored, const RowParams& params, const DrawKey* key, Workspace& work) {
  sort_candidates(scored, work);
  const float* scores = scored.scores;
  if (scores[0] == -kInfinity) return failed(Status::kNothingFinite);
  if (params.top_k > 0 && params.top_k < scored.size) {
    const float kth = scores[params.top_k - 1];
    int64_t size = params.top_k;
    while (size < scored.size && scores[size] == kth) ++size;  // every tie of the k-th
    scored.size = size;
  }
  double* weight = room(work.weights, scored.size);
  loops().weights(scores, scored.size, scores[0], weight);
  double mass = 0;
  for (int64_t i = 0; i < scored.size; ++i) mass += weight[i];
  if (params.top_p < 1) scored.size = count_nucleus(weight, scored.size, 0, mass, params.top_p);
  const float floor = std::max(scores[0] + params.log_min_p, -kLargestFloat);  // the division may have excluded some
  while (scored.size > 1 && !(scores[scored.size - 1] >= floor)) --scored.size;
  mass = 0;
  for (int64_t i = 0; i < scored.size; ++i) mass += weight[i];
  const RaceBest winner = key ? loops().race(scored, *key) : RaceBest{scores[0], scored.tokens[0], scores[0]};
  const double logprob = (static_cast<double>(winner.score) - scores[0]) - std::log(mass);
  return {winner.token, static_cast<float>(logprob), static_cast<int32_t>(scored.size), Status::kOk};
}

// top_p of candidates that are too many to sort: a histogram of their mass finds the score at which it is reached, and
// only the tokens about there are sorted.
Scored nucleus(Scored scored, double top_p, Workspace& work) {
  const Loops& loop = loops();
  const float best = loop.maximum(scored.scores, scored.size);
  if (best == -kInfinity) return scored;
  const double total = loop.mass(scored.scores, scored.size, best);
  // All tokens below this weight together hold less than half of 1 - top_p: none can be kept, so none is looked at.
  const double hopeless = std::log(0.5 * (1 - top_p) / static_cast<double>(scored.size) * total) + best;
  scored = keep_at_least(scored, static_cast<float>(hopeless), work);

  double* weight = room(work.weights, 2 * scored.size + kBins);
  loop.weights(scored.scores, scored.size, best, weight);
  const double top = best;
  const double scale = (kBins - 1) / std::max(top - std::max(hopeless, -double{kLargestFloat}), 1e-30);
  const auto bin_of = [&](float score) {
    return static_cast<int64_t>(std::clamp((top - score) * scale, 0.0, kBins - 1.0));
  };
  double* mass_of_bin = weight + scored.size;
  std::fill(mass_of_bin, mass_of_bin + kBins, 0.0);
  for (int64_t i = 0; i < scored.size; ++i) mass_of_bin[bin_of(scored.scores[i])] += weight[i];
  double before = 0;
  int64_t crossing = 0;  // the bin that holds the last token
  while (crossing < kBins - 1 && before + mass_of_bin[crossing] / total < top_p) {
    before += mass_of_bin[crossing++] / total;
  }
  // What certainly stays goes to the front, the crossing bin behind it; the rest is overwritten.
  float* bin_scores = room(work.spare, scored.size);
  int32_t* bin_tokens = room(work.spare_tokens, scored.size);
  Scored bin{bin_scores, bin_tokens, 0};
  int64_t size = 0;
  for (int64_t i = 0; i < scored.size; ++i) {
    const float score = scored.scores[i];
    const int32_t token = scored.tokens[i];
    const int64_t place = bin_of(score);
    bin.scores[bin.size] = score;
    bin.tokens[bin.size] = token;
    bin.size += place == crossing;
    scored.scores[size] = score;
    scored.tokens[size] = token;
    size += place < crossing;
  }
  sort_candidates(bin, work);
  loop.weights(bin.scores, bin.size, best, weight);
  const int64_t more = count_nucleus(weight, bin.size, before, total, top_p);
  std::copy(bin.scores, bin.scores + more, scored.scores + size);
  std::copy(bin.tokens, bin.tokens + more, scored.tokens + size);
  scored.size = size + more;
  return scored;
}

}  // namespace

float kth_best(float* x, int64_t n, int64_t k, std::vector<float>& spare) {
  if (k == 0 || k > n) return -kInfinity;
  const int64_t groups = groups_of(n);
  float* values = room(spare, n + 2 * groups);
  int64_t size = n;
  if (k <= groups) {
    float* maxima = values + n;
    const float floor = floor_of_groups(x, n, k, maxima);
    size = loops().keep_of_groups({x, nullptr, n}, maxima, floor, {values, nullptr, 0});
  } else {
    std::copy(x, x + n, values);
  }
  std::nth_element(values, values + k - 1, values + size, std::greater<float>());
  return values[k - 1];
}

RowResult choose(Scored scored, const RowParams& params, const DrawKey* key, Workspace& work) {
  const Loops& loop = loops();
  if (params.top_k > 0 && scored.size > kSortAtMost) scored = drop_hopeless(scored, params, work);
  if (params.temperature != 1.0f) loop.divide(scored.scores, scored.size, params.temperature);
  const bool filters = params.top_k > 0 || params.top_p < 1 || params.log_min_p > -kInfinity;
  if (!filters) return finish(scored, key);
  if (params.temperature < 1 && loop.maximum(scored.scores, scored.size) == kInfinity) return failed(Status::kInfinite);
  if (!scored.tokens || scored.size > kSortAtMost) scored = keep_at_least(scored, -kInfinity, work);
  if (params.top_k > 0 && scored.size > kSortAtMost) {
    scored = keep_at_least(scored, kth_best(scored.scores, scored.size, params.top_k, work.spare), work);
  }
  if (scored.size == 0) return failed(Status::kNothingFinite);
  if (scored.size <= kSortAtMost) return choose_sorted(scored, params, key, work);
  if (params.top_p < 1) scored = nucleus(scored, params.top_p, work);
  if (params.log_min_p > -kInfinity) {
    scored = keep_at_least(scored, loop.maximum(scored.scores, scored.size) + params.log_min_p, work);
  }
  return finish(scored, key);
}

RowResult finish(const Scored& scored, const DrawKey* key) {
  const Loops& loop = loops();
  const Summary all = loop.summarise(scored.scores, scored.size);
  const float best = all.largest;
  if (best == -kInfinity) return failed(Status::kNothingFinite);
  if (best == kInfinity) return failed(Status::kInfinite);
  int64_t token;
  float score = best;
  if (key) {
    const RaceBest winner = loop.race(scored, *key);
    token = winner.token;
    score = winner.score;
  } else if (scored.tokens) {
    token = INT64_MAX;
    for (int64_t i = 0; i < scored.size; ++i) {
      if (scored.scores[i] == best) token = std::min<int64_t>(token, scored.tokens[i]);
    }
  } else {
    token = loop.find(scored.scores, scored.size, best);
  }
  const double log_mass = std::log(loop.rough_mass(scored.scores, scored.size, best));
  const float logprob = static_cast<float>((static_cast<double>(score) - best) - log_mass);
  return {token, logprob, static_cast<int32_t>(all.n_finite), Status::kOk};
}

}  // namespace safecode::cpu
