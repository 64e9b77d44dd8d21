// How many tokens of a dense row does a filter keep? All filters keep the first ones in some order; the search finds
// the last of them by histograms over ever smaller ranges of keys.
#pragma once

#include "row.cuh"

namespace safecode::cuda {

// Calls function(token) for the tokens of this thread of a dense row: the same ones at every call.
template <class Function>
__device__ inline void for_each_token(Function&& function) {
  const uint32_t end = shared().dense.part.end;
  for (uint32_t token = shared().dense.part.begin + threadIdx.x; token < end; token += kThreads) function(token);
}

// Inclusive bounds of the keys that a search considers.
struct KeyRange {
  uint64_t first, last;
};

// The sum over all threads before this one.
__device__ inline Mass mass_before(const Mass& value) {
  ReductionSlots& slots = shared().slots;
  Mass sum = value;
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const Mass other = shuffle_up(sum, offset);
    if (lane() >= offset) sum = MassSum()(sum, other);
  }
  if (lane() == kWarpSize - 1) memcpy(slots.warp[warp()], &sum, sizeof(sum));
  __syncthreads();
  for (int i = 0; i < warp(); ++i) {
    Mass other;
    memcpy(&other, slots.warp[i], sizeof(other));
    sum = MassSum()(sum, other);
  }
  __syncthreads();
  sum.subtract(value);
  return sum;
}

// Units and goal of a search that counts tokens.
__device__ inline uint64_t count_one(uint32_t) { return 1; }
__device__ inline Mass count_of(int64_t tokens) { return {static_cast<uint64_t>(tokens), 0}; }

template <bool kWeighted>
__device__ inline void count_token(Histogram& histogram, uint32_t bin, uint64_t units) {
  atomicAdd(&histogram.tokens[bin], 1u);
  if constexpr (kWeighted) {
    const auto low = static_cast<uint32_t>(units);
    const uint32_t carry = atomicAdd(&histogram.low[bin], low) + low < low;
    const uint32_t middle = static_cast<uint32_t>(units >> 32) + carry;
    if (middle && atomicAdd(&histogram.middle[bin], middle) + middle < middle) atomicAdd(&histogram.high[bin], 1u);
  }
}

// A bin over all blocks of the group.
struct Bin {
  uint32_t tokens;
  Mass mass;
};

template <class Group, bool kWeighted>
__device__ inline Bin bin_of_group(Histogram& histogram, int index) {
  Bin bin{0, {0, 0}};
  for (int rank = 0; rank < Group::size(); ++rank) {
    bin.tokens += *Group::at(&histogram.tokens[index], rank);
    if constexpr (kWeighted) {
      const uint64_t middle = *Group::at(&histogram.middle[index], rank);
      bin.mass.add(middle << 32 | *Group::at(&histogram.low[index], rank));
      bin.mass.high += *Group::at(&histogram.high[index], rank);
    }
  }
  if constexpr (!kWeighted) bin.mass.low = bin.tokens;
  return bin;
}

// Finds the bin where the mass reaches the goal, into shared().crossing of every block. Begins and ends with a barrier.
template <class Group, bool kWeighted>
__device__ inline void find_crossing(const Mass& goal) {
  static_assert(kBins % kThreads == 0 || kThreads % kBins == 0, "bins are shared out evenly");
  constexpr int kEach = kBins > kThreads ? kBins / kThreads : 1;
  if (threadIdx.x == 0) shared().crossing.bin = -1;
  Group::sync();
  const int first = static_cast<int>(threadIdx.x) * kEach;
  const int last = first < kBins ? first + kEach : first;
  Mass own{0, 0};
  for (int i = first; i < last; ++i) {
    own = MassSum()(own, bin_of_group<Group, kWeighted>(shared().histogram, i).mass);
  }
  Mass before = mass_before(own);
  if (before.is_below(goal) && !MassSum()(before, own).is_below(goal)) {
    for (int i = first; i < last; ++i) {
      const Bin bin = bin_of_group<Group, kWeighted>(shared().histogram, i);
      const Mass after = MassSum()(before, bin.mass);
      if (!after.is_below(goal)) {
        shared().crossing = {i, bin.tokens, before};
        break;
      }
      before = after;
    }
  }
  Group::sync();
}

// The tokens of a row in the order of their keys, kept while what lies before them is below the goal: all up to the key
// that is returned (kNoKey: all in the range). Tokens of one key are kept together. `key_of(token)` gives the key or
// kNoKey, `units_of(token)` what the token counts. Every thread of the group takes part. Without kExact the key
// returned may lie between the last one that is kept and the next one: found sooner, and as good for the tokens
// searched.
template <class Group, bool kWeighted, bool kExact, class Key, class Units>
__device__ uint64_t last_kept(KeyRange range, Mass goal, Key key_of, Units units_of) {
  Histogram& histogram = shared().histogram;
  for (;;) {
    const int bits = range.last > range.first ? 64 - __clzll(static_cast<long long>(range.last - range.first)) : 0;
    const int shift = bits > kBinBits ? bits - kBinBits : 0;
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) {
      histogram.tokens[i] = histogram.low[i] = histogram.middle[i] = histogram.high[i] = 0;
    }
    __syncthreads();
    for_each_token([&](uint32_t token) {
      const uint64_t key = key_of(token);
      if (key < range.first || key > range.last) return;
      count_token<kWeighted>(histogram, static_cast<uint32_t>((key - range.first) >> shift), units_of(token));
    });
    find_crossing<Group, kWeighted>(goal);
    const Crossing crossing = shared().crossing;
    Group::sync();
    if (crossing.bin < 0) return kNoKey;
    goal.subtract(crossing.before);
    range.first += static_cast<uint64_t>(crossing.bin) << shift;
    const uint64_t last_of_bin = range.first + ((uint64_t{1} << shift) - 1);
    range.last = last_of_bin < range.last ? last_of_bin : range.last;
    if (shift == 0 || (!kExact && crossing.tokens == 1)) return range.last;
  }
}

}  // namespace safecode::cuda
