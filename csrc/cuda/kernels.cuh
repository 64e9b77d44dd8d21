// The kernels: decode and scores, each in two forms: a cluster of blocks per row, and blocks without clusters.
#pragma once

#include "candidates.cuh"
#include "choose_dense.cuh"
#include "dense.cuh"
#include "gather.cuh"

namespace safecode::cuda {

constexpr int kBlocksPerMultiprocessor = 1;

// A row that is dense from the start is gathered without a look at it.
constexpr Gathered kNotGathered = {0.0f, false};

// Decodes a row from its candidates, or as a whole if they don't fit, and stores the result.
template <class Group, class Format>
__device__ void finish_row(const Task& task, const Gathered& gathered) {
  const int64_t row = shared().row.index;
  // An infinity may be a clean logit's or the bias': the way over the whole row tells.
  const bool is_few = gathered.fits && gathered.best < kInfinity;
  Status status = gathered.best == kInfinity ? Status::kOk : status_of_best(gathered.best);
  RowResult result = failed(status);
  if (status == Status::kOk && !is_few) {
    const float floor = shared().row.gather().floor(gathered.best);
    begin_dense<Group, Format>(task, floor, task.dense + row * task.vocab_size);
    status = write_scores<Group, Format>();
    result = status == Status::kOk ? choose_dense<Group>() : failed(status);
  }
  Group::arrive();  // from here on no block looks into the memory of another one
  if (Group::rank() == 0) {
    if (status == Status::kOk && is_few) result = decode_candidates();
    if (threadIdx.x == 0) store(task, row, result);
  }
  Group::wait();
}

// What a block begins with: its slice, whose first logits are on their way while the row's parameters are read.
template <class Format>
struct Start {
  Slice<Format> slice;
  Tile<Format> tile;

  __device__ static Start of(const Task& task, int64_t row, int rank, int size) {
    const auto slice = Slice<Format>::of(Logits<Format>::of_row(task.clean, row), task.vocab_size, rank, size);
    Start start{slice, {}};
    start.tile.load(slice, slice.begin);
    begin_row(task, row);
    return start;
  }
};

// Grid: rows * S blocks in clusters of S.
template <class Format>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    decode_cluster(const __grid_constant__ Task task) {
#if defined(SAFECODE_HAS_CLUSTERS)
  const int64_t row = blockIdx.x / ClusterGroup::size();
  const auto start = Start<Format>::of(task, row, ClusterGroup::rank(), ClusterGroup::size());
  Gathered gathered = kNotGathered;
  if (!shared().row.is_dense()) {
    const Gather gather = shared().row.gather();
    const float own_best = scan(start.slice, start.tile, gather);
    gathered = gather_in_group<ClusterGroup>(Logits<Format>::of_row(task.noised, row), gather, own_best);
  }
  finish_row<ClusterGroup, Format>(task, gathered);
#endif
}

// Grid: rows * S blocks. The last block of a row to be done finishes it; a dense row is one block's from the start.
template <class Format>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    decode_blocks(const __grid_constant__ Task task) {
  const int blocks = task.blocks_per_row;
  const int64_t row = blockIdx.x / blocks;
  const int rank = static_cast<int>(blockIdx.x % blocks);
  const auto start = Start<Format>::of(task, row, rank, blocks);
  Gathered gathered = kNotGathered;
  if (shared().row.is_dense()) {
    if (rank != 0) return;
  } else {
    const Gather gather = shared().row.gather();
    const auto noised = Logits<Format>::of_row(task.noised, row);
    const float own_best = scan(start.slice, start.tile, gather);
    if (blocks == 1) {
      gathered = gather_in_group<BlockGroup>(noised, gather, own_best);
    } else {
      leave_record(task.slices, blockIdx.x, noised, gather, own_best);
      if (!is_last_block(task.slices.tickets + row, blocks)) return;
      gathered = take_records(task.slices, row * blocks, blocks, gather);
    }
  }
  finish_row<BlockGroup, Format>(task, gathered);
}

template <class Group, class Format>
__device__ void score_whole_row(const Task& task, int64_t index) {
  begin_row(task, index);
  const int64_t begin = index * task.vocab_size;
  begin_dense<Group, Format>(task, 0.0f, task.scores + begin);
  const Status status = write_all_scores<Group, Format>(task.biased_clean + begin, task.keep + begin);
  if (Group::rank() == 0 && threadIdx.x == 0) task.status[index] = static_cast<int32_t>(status);
}

template <class Format>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    scores_cluster(const __grid_constant__ Task task) {
#if defined(SAFECODE_HAS_CLUSTERS)
  score_whole_row<ClusterGroup, Format>(task, blockIdx.x / ClusterGroup::size());
#endif
}

// One block per row.
template <class Format>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    scores_blocks(const __grid_constant__ Task task) {
  score_whole_row<BlockGroup, Format>(task, blockIdx.x);
}

}  // namespace safecode::cuda
