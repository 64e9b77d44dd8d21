// From the scores of a whole row to one token, by all blocks of its group.
#pragma once

#include "choose.cuh"
#include "search.cuh"

namespace safecode::cuda {

// The key of a token; kNoKey if it is excluded or comes after the limit.
__device__ inline uint64_t key_up_to(uint64_t limit, uint32_t token) {
  const float score = shared().dense.scores[token];
  if (!(score > -kInfinity)) return kNoKey;
  const uint64_t key = shared().dense.order.key(score, token);
  return key <= limit ? key : kNoKey;
}

constexpr uint64_t kNoLimit = kNoKey - 1;

// The limit of top_k: the last key that a token with the K-th best score might have.
template <class Group>
__device__ uint64_t limit_of_top_k() {
  const KeyRange range{descending(shared().dense.best), descending(-kLargestFloat)};
  const auto key_of = [](uint32_t token) -> uint64_t {
    const float score = shared().dense.scores[token];
    return score > -kInfinity ? descending(score) : kNoKey;
  };
  const uint64_t last = last_kept<Group, false, false>(range, count_of(shared().row.params.top_k), key_of, count_one);
  return last == kNoKey ? kNoLimit : shared().dense.order.last_of_score(static_cast<uint32_t>(last));
}

__device__ inline double nucleus_weight(uint32_t token) {
  return exp(static_cast<double>(shared().dense.scores[token]) - shared().dense.best);
}

// The limit of top_p among the tokens up to `limit`.
template <class Group>
__device__ uint64_t limit_of_top_p(uint64_t limit) {
  const double top_p = shared().row.params.top_p;
  const float best = shared().dense.best;
  const TokenOrder order = shared().dense.order;
  Mass mass{0, 0};
  for_each_token([&](uint32_t token) {
    if (key_up_to(limit, token) != kNoKey) mass.add(units(nucleus_weight(token)));
  });
  const double total = reduce<Group>(mass, MassSum()).value();
  // All tokens below this weight together hold less than half of 1 - top_p: none can be kept, so none is searched.
  const double hopeless = log(0.5 * (1 - top_p) / shared().row.vocab_size * total) + best;
  const float floor = hopeless > -kLargestFloat ? static_cast<float>(hopeless) : -kLargestFloat;
  const uint64_t last_hopeful = order.last_of_score(descending(floor));
  const KeyRange range{order.key(best, 0), last_hopeful < limit ? last_hopeful : limit};
  const auto key_of = [&](uint32_t token) { return key_up_to(range.last, token); };
  const auto units_of = [](uint32_t token) { return units(nucleus_weight(token)); };
  const uint64_t last = last_kept<Group, true, false>(range, Mass::at_least(top_p * total), key_of, units_of);
  return last == kNoKey ? limit : last;
}

// ---- the race over many tokens: bounds in fp32 leave a few for fp64 ----

constexpr float kBoundSlack = 1e-4f;     // covers the fast logarithm and the rounding of sums of ordinary scores
constexpr float kScoreSlack = 0x1p-22f;  // and, times the score, of large ones
constexpr float kLn2 = 0.69314718f;
constexpr float kLeastGumbel = -3.2f;  // -log(33 log(2)), which 32 bits give at least, lies above

struct RaceBounds {
  float lower, upper;
};

// E = -log1p(-q) lies between q and q / (1 - q), so gumbel = -log(E) between -log(q) + log(1 - q) and -log(q).
__device__ inline RaceBounds race_bounds(float score, uint32_t bits) {
  const float q = (static_cast<float>(bits) + 0.5f) * 0x1p-32f;
  const float upper = score - kLn2 * __log2f(q);
  const float lower = q <= 0.5f ? upper - 2 * kLn2 * q : score + kLeastGumbel;  // log(1 - q) >= -2 log(2) q up to 1/2
  const float slack = kBoundSlack + kScoreSlack * fabsf(score);
  return {lower - slack, upper + slack};
}

// Calls function(token, bits) for the tokens up to the limit, four to a call of the cipher.
template <class Function>
__device__ inline void for_each_draw(uint64_t limit, Function&& function) {
  const uint32_t end = (shared().dense.part.end + 31) / 32 * 8;
#pragma unroll 1
  for (uint32_t block = shared().dense.part.begin / 4 + threadIdx.x; block < end; block += kThreads) {
    const uint32_t first = block / 8 * 32 + block % 8;
    uint32_t kept = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t token = first + 8 * i;
      if (token < shared().row.vocab_size && key_up_to(limit, token) != kNoKey) kept |= 1u << i;
    }
    if (!kept) continue;
    const PhiloxWords words = philox(block, shared().row.draw);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (kept >> i & 1) function(first + 8 * i, words.word[i]);
    }
  }
}

template <class Group>
__device__ Finalist race(uint64_t limit) {
  RaceBounds best{-kInfinity, -kInfinity};
  for_each_draw(limit, [&](uint32_t token, uint32_t bits) {
    const RaceBounds bounds = race_bounds(shared().dense.scores[token], bits);
    best.lower = bounds.lower > best.lower ? bounds.lower : best.lower;
    best.upper = bounds.upper > best.upper ? bounds.upper : best.upper;
  });
  const float least = reduce<Group>(best.lower, Larger());
  Finalist winner = kNoFinalist;
  if (best.upper >= least) {
    for_each_draw(limit, [&](uint32_t token, uint32_t bits) {
      const float score = shared().dense.scores[token];
      if (race_bounds(score, bits).upper >= least) winner = Winner()(winner, {score + gumbel(bits), token, score});
    });
  }
  return reduce<Group>(winner, Winner());
}

// ---- the choice ----

template <class Group>
__device__ int32_t count_up_to(uint64_t limit) {
  int32_t count = 0;
  for_each_token([&](uint32_t token) { count += key_up_to(limit, token) != kNoKey; });
  return reduce<Group>(count, Sum());
}

// Moves the tokens up to the limit, at most kThreads of them, to the first block.
template <class Group>
__device__ void compact(uint64_t limit) {
  Candidates& few = *Group::at(&shared().candidates, 0);
  if (Group::rank() == 0 && threadIdx.x == 0) few.size = 0;
  Group::sync();
  for_each_token([&](uint32_t token) {
    if (key_up_to(limit, token) == kNoKey) return;
    const int place = atomicAdd(&few.size, 1);
    few.token[place] = token;
    few.clean[place] = shared().dense.scores[token];
  });
  Group::sync();
}

// The draw from the tokens up to the limit.
template <class Group>
__device__ RowResult draw_up_to(uint64_t limit) {
  const float best = shared().dense.best;
  Mass mass{0, 0};
  int32_t n_kept = 0;
  uint64_t first = kNoKey;
  for_each_token([&](uint32_t token) {
    const uint64_t key = key_up_to(limit, token);
    if (key == kNoKey) return;
    mass.add(units(expf(shared().dense.scores[token] - best)));
    ++n_kept;
    first = key < first ? key : first;
  });
  mass = reduce<Group>(mass, MassSum());
  n_kept = reduce<Group>(n_kept, Sum());
  if (shared().row.greedy) {
    first = reduce<Group>(first, Smaller());
    return result_of(best, shared().dense.order.token(first), best, mass, n_kept);
  }
  const Finalist winner = race<Group>(limit);
  return result_of(winner.score, winner.token, best, mass, n_kept);
}

// top_k, top_p, min_p and the draw over a whole row. The result is that of the first block.
template <class Group>
__device__ RowResult choose_dense() {
  const RowParams& params = shared().row.params;
  const float best = shared().dense.best;
  const Status status = status_of_best(best);
  if (status != Status::kOk) return failed(status);
  uint64_t limit = params.top_k > 0 ? limit_of_top_k<Group>() : kNoLimit;
  // Few tokens always go one way, so that the result does not depend on how the row came to be dense.
  const int32_t size = count_up_to<Group>(limit);
  if (size <= kThreads) {
    compact<Group>(limit);
    if (Group::rank() != 0) return failed(Status::kOk);
    const int i = static_cast<int>(threadIdx.x);
    const Candidates& few = shared().candidates;
    return choose(i < size ? few.clean[i] : -kInfinity, i < size ? few.token[i] : 0, size);
  }
  if (params.top_p < 1) limit = limit_of_top_p<Group>(limit);
  if (params.log_min_p > -kInfinity) {
    const uint64_t last = shared().dense.order.last_of_score(descending(best + params.log_min_p));
    limit = last < limit ? last : limit;
  }
  return draw_up_to<Group>(limit);
}

}  // namespace safecode::cuda
