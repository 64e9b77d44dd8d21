#include "select.h"

#include <algorithm>
#include <cmath>
#include <functional>

namespace safecode::cpu {
namespace {

constexpr int64_t kSortAtOnce = 2048;  // so many tokens are sorted as they are; more go through a histogram of their mass
constexpr int64_t kBins = 1024;

bool goes_before(float score, int32_t token, float other_score, int32_t other_token) {
  return score > other_score || (score == other_score && token < other_token);
}

// Keeps scores at least `floor`, in the workspace; scores of -inf never stay.
Scored keep_at_least(const Scored& scored, float floor, Workspace& work) {
  Scored kept{scored.scores, scored.tokens, 0};
  if (!kept.tokens) {
    // keep_at_least writes one place beyond what it keeps, never beyond what it has read.
    kept.tokens = room(work.tokens, scored.size);
  }
  kept.size = loops().keep_at_least(scored, std::max(floor, -kLargestFloat), kept);
  return kept;
}

// A superset of what top_k keeps, found before the division by the temperature, so that only these few are divided.
// The division could make equal what differs by an ulp, so the floor lies lower; where it could also underflow, all stay.
Scored drop_hopeless(const Scored& scored, const RowParams& params, Workspace& work) {
  const float floor = kth_best(scored.scores, scored.size, params.top_k, work.spare);
  const bool safe = params.temperature > 0x1p-10f && params.temperature < 0x1p10f && std::fabs(floor) > 1e-30f;
  if (!safe || floor == -kInfinity) return scored;
  return keep_at_least(scored, floor - std::fabs(floor) * 0x1p-20f, work);
}

struct Entry {
  float score;
  int32_t token;
  double weight;
};

// Keeps the first of `entries`, by (score descending, token ascending), while the mass before each is below top_p.
// `before` is the share of what goes before all of them. Returns how many stay.
int64_t cut_sorted(std::vector<Entry>& entries, double before, double total, double top_p) {
  std::sort(entries.begin(), entries.end(),
            [](const Entry& a, const Entry& b) { return goes_before(a.score, a.token, b.score, b.token); });
  int64_t size = 0;
  while (size < static_cast<int64_t>(entries.size()) && before < top_p) before += entries[size++].weight / total;
  return size;
}

// By (score descending, token ascending), keeps while the mass before the token is below top_p; mass in double.
Scored nucleus(Scored scored, double top_p, Workspace& work) {
  const Loops& loop = loops();
  const float best = loop.maximum(scored.scores, scored.size);
  if (best == -kInfinity) return scored;
  const double total = loop.mass(scored.scores, scored.size, best);
  // All tokens below this weight together hold less than half of 1 - top_p: none can be kept, so none is sorted.
  const double hopeless = std::log(0.5 * (1 - top_p) / static_cast<double>(scored.size) * total) + best;
  scored = keep_at_least(scored, static_cast<float>(hopeless), work);

  double* weight = room(work.weights, scored.size + kBins);
  loop.weights(scored.scores, scored.size, best, weight);
  double before = 0;
  int64_t size = 0;  // tokens that certainly stay are moved to the front
  std::vector<Entry> entries;
  if (scored.size <= kSortAtOnce) {
    for (int64_t i = 0; i < scored.size; ++i) entries.push_back({scored.scores[i], scored.tokens[i], weight[i]});
  } else {
    const double top = best;
    const double scale = (kBins - 1) / std::max(top - std::max(hopeless, -double{kLargestFloat}), 1e-30);
    const auto bin_of = [&](float score) {
      return static_cast<int64_t>(std::clamp((top - score) * scale, 0.0, kBins - 1.0));
    };
    double* mass_of_bin = weight + scored.size;
    std::fill(mass_of_bin, mass_of_bin + kBins, 0.0);
    for (int64_t i = 0; i < scored.size; ++i) mass_of_bin[bin_of(scored.scores[i])] += weight[i];
    int64_t crossing = 0;  // the bin that holds the last token
    while (crossing < kBins - 1 && before + mass_of_bin[crossing] / total < top_p) {
      before += mass_of_bin[crossing++] / total;
    }
    for (int64_t i = 0; i < scored.size; ++i) {
      const float score = scored.scores[i];
      const int32_t token = scored.tokens[i];
      const int64_t bin = bin_of(score);
      if (bin == crossing) entries.push_back({score, token, weight[i]});
      scored.scores[size] = score;
      scored.tokens[size] = token;
      size += bin < crossing;
    }
  }
  const int64_t more = cut_sorted(entries, before, total, top_p);
  for (int64_t i = 0; i < more; ++i, ++size) {
    scored.scores[size] = entries[i].score;
    scored.tokens[size] = entries[i].token;
  }
  scored.size = size;
  return scored;
}

}  // namespace

float kth_best(const float* x, int64_t n, int64_t k, std::vector<float>& spare) {
  if (k == 0 || k > n) return -kInfinity;
  const int64_t groups = (n + kGroup - 1) / kGroup;
  float* values = room(spare, n + 2 * groups);
  int64_t size = n;
  float floor = -kInfinity;
  if (k <= groups) {  // k groups have a maximum of at least `floor`, so have k values
    float* maxima = values + n;
    loops().group_maxima(x, n, maxima);
    float* ordered = maxima + groups;
    std::copy(maxima, maxima + groups, ordered);
    std::nth_element(ordered, ordered + k - 1, ordered + groups, std::greater<float>());
    floor = ordered[k - 1];
    size = 0;
    for (int64_t group = 0; group < groups; ++group) {
      if (maxima[group] < floor) continue;
      for (int64_t i = group * kGroup; i < std::min(n, (group + 1) * kGroup); ++i) {
        values[size] = x[i];
        size += x[i] >= floor;
      }
    }
  } else {
    std::copy(x, x + n, values);
  }
  std::nth_element(values, values + k - 1, values + size, std::greater<float>());
  return values[k - 1];
}

RowResult choose(Scored scored, const RowParams& params, const DrawKey* key, Workspace& work) {
  const Loops& loop = loops();
  if (params.top_k > 0 && scored.size > kSortAtOnce) scored = drop_hopeless(scored, params, work);
  if (params.temperature != 1.0f) {
    loop.divide(scored.scores, scored.size, params.temperature);
    if (loop.maximum(scored.scores, scored.size) == kInfinity) return {0, -kInfinity, 0, Status::kInfinite};
  }
  if (params.top_k > 0) {
    const float floor = kth_best(scored.scores, scored.size, params.top_k, work.spare);
    if (floor > -kInfinity) scored = keep_at_least(scored, floor, work);
  }
  if (params.top_p < 1) scored = nucleus(scored, params.top_p, work);
  if (params.log_min_p > -kInfinity) {
    const float floor = loop.maximum(scored.scores, scored.size) + params.log_min_p;
    scored = keep_at_least(scored, floor, work);
  }
  return finish(scored, key);
}

RowResult finish(const Scored& scored, const DrawKey* key) {
  const Loops& loop = loops();
  const float best = loop.maximum(scored.scores, scored.size);
  if (best == -kInfinity) return {0, -kInfinity, 0, Status::kNothingFinite};
  if (best == kInfinity) return {0, -kInfinity, 0, Status::kInfinite};
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
  const auto n_kept = static_cast<int32_t>(loop.count_finite(scored.scores, scored.size));
  return {token, logprob, n_kept, Status::kOk};
}

}  // namespace safecode::cpu
