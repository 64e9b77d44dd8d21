// From what each block found in its slice to the candidates of the row, in the shared memory of one block.
#pragma once

#include "scan.cuh"

namespace safecode::cuda {

struct Gathered {
  float best;  // largest lifted logit of the row, NaN if there is a NaN
  bool fits;   // all candidates are in shared().candidates of the first block
};

// Adds a candidate; counts what finds no room.
__device__ inline void add_candidate(Candidates& all, uint32_t token, float clean, float noised) {
  const int place = atomicAdd(&all.size, 1);
  if (place >= kThreads) return;
  all.token[place] = token;
  all.clean[place] = clean;
  all.noised[place] = noised;
}

__device__ inline bool passes(uint32_t token, float clean, float raise, float floor) {
  return is_gathered(shared().row.lifted(clean, token & kRefusal), raise, floor);
}

// The few tokens that a thread keeps of its block's `found`: likely candidates, with their noised logits.
struct Likely {
  static constexpr int kEach = kScanCapacity / kThreads;
  uint32_t token[kEach];  // with their mark
  float clean[kEach];     // -inf: none
  float noised[kEach];

  // What passes the block's own threshold; the row's is not known yet, but the noised logits are on their way.
  template <class Format>
  __device__ static Likely of(const Found& found, const Logits<Format>& noised, float raise, float floor) {
    Likely likely;
    const int size = found.size <= kScanCapacity ? found.size : 0;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int i = static_cast<int>(threadIdx.x) + k * kThreads;
      const bool is_likely = i < size && passes(found.token[i], found.clean[i], raise, floor);
      likely.token[k] = is_likely ? found.token[i] : 0;
      likely.clean[k] = is_likely ? found.clean[i] : -kInfinity;
      likely.noised[k] = is_likely && noised.data ? noised.at(likely.token[k] & ~kRefusal) : 0.0f;
    }
    return likely;
  }

  template <class Function>
  __device__ void for_each(float raise, float floor, Function&& function) const {
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (passes(token[k], clean[k], raise, floor)) function(token[k], clean[k], noised[k]);
    }
  }
};

// Within a group: every block pushes its candidates to the first one. Ends with a barrier of the group.
template <class Group, class Format>
__device__ Gathered gather_in_group(const Logits<Format>& noised, const Gather& gather, float own_best) {
  const Likely likely = Likely::of(shared().found, noised, gather.raise, gather.floor(own_best));
  if (threadIdx.x == 0) {
    shared().best = own_best;
    shared().fits = shared().found.size <= kScanCapacity;
  }
  Group::sync();
  Gathered row{-kInfinity, true};
  for (int rank = 0; rank < Group::size(); ++rank) {
    row.best = max_nan(row.best, *Group::at(&shared().best, rank));
    row.fits = row.fits && *Group::at(&shared().fits, rank);
  }
  Candidates& all = *Group::at(&shared().candidates, 0);
  likely.for_each(gather.raise, gather.floor(row.best), [&](uint32_t token, float clean, float other) {
    add_candidate(all, token, clean, other);
  });
  Group::sync();
  row.fits = row.fits && all.size <= kThreads;
  return row;
}

// Without clusters: a block leaves its likely candidates in global memory.
template <class Format>
__device__ void leave_record(const SliceRecords& records, int64_t record, const Logits<Format>& noised,
                             const Gather& gather, float own_best) {
  const float floor = gather.floor(own_best);
  const Likely likely = Likely::of(shared().found, noised, gather.raise, floor);
  likely.for_each(gather.raise, floor, [&](uint32_t token, float clean, float other) {
    const int place = atomicAdd(&shared().candidates.size, 1);
    if (place >= kThreads) return;
    records.token[record * kThreads + place] = token;
    records.clean[record * kThreads + place] = clean;
    records.noised[record * kThreads + place] = other;
  });
  __syncthreads();
  if (threadIdx.x == 0) {
    records.best[record] = own_best;
    records.size[record] = shared().found.size <= kScanCapacity ? shared().candidates.size : kThreads + 1;
  }
}

// Whether all other blocks of the row have left their records. The ticket is 0 again afterwards, for the next launch.
// One thread's fences serve the block: barriers order what the others wrote before and read after.
__device__ inline bool is_last_block(uint32_t* ticket, int blocks) {
  const uint32_t last = static_cast<uint32_t>(blocks) - 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    shared().is_last = atomicInc(ticket, last) == last;
    __threadfence();
  }
  __syncthreads();
  return shared().is_last;
}

// The last block takes the records, `blocks` of them from `first` on. Ends with a barrier.
__device__ inline Gathered take_records(const SliceRecords& records, int64_t first, int blocks, const Gather& gather) {
  Gathered row{-kInfinity, true};
  for (int64_t record = first; record < first + blocks; ++record) {
    row.best = max_nan(row.best, __ldcg(records.best + record));
    row.fits = row.fits && __ldcg(records.size + record) <= kThreads;
  }
  if (threadIdx.x == 0) shared().candidates.size = 0;
  __syncthreads();
  const float floor = gather.floor(row.best);
  for (int64_t record = first + warp(); row.fits && record < first + blocks; record += kWarps) {
    const int size = __ldcg(records.size + record);
    for (int64_t i = record * kThreads + lane(); i < record * kThreads + size; i += kWarpSize) {
      const uint32_t token = __ldcg(records.token + i);
      const float clean = __ldcg(records.clean + i);
      if (!passes(token, clean, gather.raise, floor)) continue;
      add_candidate(shared().candidates, token, clean, __ldcg(records.noised + i));
    }
  }
  __syncthreads();
  row.fits = row.fits && shared().candidates.size <= kThreads;
  return row;
}

}  // namespace safecode::cuda
