// From the scores of at most kThreads tokens to one of them, by one block.
#pragma once

#include "row.cuh"

namespace safecode::cuda {

struct Finalist {
  double value;  // of the race
  uint32_t token;
  float score;
};

// The race: the larger value, the lower id of two that are equal.
struct Winner {
  __device__ Finalist operator()(const Finalist& a, const Finalist& b) const {
    return a.value > b.value || (a.value == b.value && a.token < b.token) ? a : b;
  }
};

constexpr Finalist kNoFinalist = {-static_cast<double>(kInfinity), 0xFFFFFFFFu, -kInfinity};

__device__ inline Finalist finalist(float score, uint32_t token, const DrawKey& key) {
  return {score + gumbel(token_bits(token, key)), token, score};
}

__device__ inline RowResult result_of(float score, uint32_t token, float best, const Mass& mass, int32_t n_kept) {
  const double logprob = (static_cast<double>(score) - best) - log(mass.value());
  return {token, static_cast<float>(logprob), n_kept, Status::kOk};
}

// How many of the `kept` best tokens the nucleus keeps. Thread r holds the r-th best score. The mass before it is
// summed up in this order, as on a CPU: equal scores make ties with top_p that rounding decides, and should decide
// alike.
__device__ inline int nucleus(float score, float best, int kept, double top_p) {
  const int rank = static_cast<int>(threadIdx.x);
  const double weight = rank < kept ? exp(static_cast<double>(score) - best) : 0.0;
  const Mass mass = reduce_block(Mass{units(weight), 0}, MassSum());
  shared().shares[rank] = weight / mass.value();
  __syncthreads();
  double before = 0;
  for (int i = 0; i < rank && before < top_p; ++i) before += shared().shares[i];
  return __syncthreads_count(rank < kept && before < top_p);
}

// top_k, top_p, min_p and the draw. Every thread below `size` brings one token and its score divided by the
// temperature, -inf if it is excluded.
inline __device__ RowResult choose(float score, uint32_t token, int size) {
  const Row& row = shared().row;
  const RowParams& params = row.params;
  const int rank = static_cast<int>(threadIdx.x);
  if (rank >= size) score = -kInfinity;
  const float best = reduce_block(score, Larger());
  const Status status = status_of_best(best);
  if (status != Status::kOk) return failed(status);

  // Sorted by counting what goes before.
  const TokenOrder order = TokenOrder::of(row.vocab_size);
  const bool is_alive = score > -kInfinity;
  const uint64_t key = is_alive ? order.key(score, token) : kNoKey;
  shared().keys[rank] = key;
  int kept = __syncthreads_count(is_alive);
  int place = 0;
  for (int i = 0; i < size; ++i) place += shared().keys[i] < key;
  if (is_alive) shared().sorted[place] = key;
  __syncthreads();

  // From here on thread r has the r-th best token, and filters keep the first so many.
  if (rank < kept) {
    score = order.score(shared().sorted[rank]);
    token = order.token(shared().sorted[rank]);
  }
  if (params.top_k > 0 && params.top_k < kept) {
    const float least = order.score(shared().sorted[params.top_k - 1]);
    kept = __syncthreads_count(rank < kept && score >= least);
  }
  if (params.top_p < 1) kept = nucleus(score, best, kept, params.top_p);
  if (params.log_min_p > -kInfinity) {
    kept = __syncthreads_count(rank < kept && score >= best + params.log_min_p);
  }

  const bool is_kept = rank < kept;
  const Mass mass =
      reduce_block(Mass{is_kept ? units(expf(score - best)) : 0, 0}, MassSum());
  if (row.greedy) return result_of(best, order.token(shared().sorted[0]), best, mass, kept);
  const DrawKey draw = row.draw;
  const Finalist winner =
      reduce_block(is_kept ? finalist(score, token, draw) : kNoFinalist, Winner());
  return result_of(winner.score, winner.token, best, mass, kept);
}

}  // namespace safecode::cuda
