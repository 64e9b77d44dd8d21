// The blocks that work together on one row (a group is a type: it has nothing to remember), and reductions over all
// their threads. Every thread of the group takes part and receives the result; the operations are exact and
// commutative.
#pragma once

#include "exact.cuh"

namespace safecode::cuda {

constexpr int kSlotBytes = 16;

// Room for one value of each warp and one of the block.
struct ReductionSlots {
  alignas(kSlotBytes) unsigned char warp[kWarps][kSlotBytes];
  alignas(kSlotBytes) unsigned char block[kSlotBytes];
};

// A block on its own.
struct BlockGroup {
  static constexpr bool kIsBlock = true;
  __device__ static int rank() { return 0; }
  __device__ static int size() { return 1; }
  __device__ static void sync() { __syncthreads(); }
  // The two halves of a barrier.
  __device__ static void arrive() {}
  __device__ static void wait() {}
  // The same place in the shared memory of another block.
  template <class T>
  __device__ static T* at(T* place, int) {
    return place;
  }
};

#if defined(SAFECODE_HAS_CLUSTERS)
// The blocks of a cluster, which can reach into each other's shared memory.
struct ClusterGroup {
  static constexpr bool kIsBlock = false;
  __device__ static cooperative_groups::cluster_group cluster() { return cooperative_groups::this_cluster(); }
  __device__ static int rank() { return static_cast<int>(cluster().block_rank()); }
  __device__ static int size() { return static_cast<int>(cluster().num_blocks()); }
  __device__ static void sync() { cluster().sync(); }
  __device__ static void arrive() { (void)cluster().barrier_arrive(); }
  __device__ static void wait() { cluster().barrier_wait(); }
  template <class T>
  __device__ static T* at(T* place, int rank) {
    return cluster().map_shared_rank(place, rank);
  }
};
#endif

template <class T, class Operation>
__device__ inline T reduce_warp(T value, Operation operation) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value = operation(value, shuffle_xor(value, offset));
  return value;
}

template <class T, class Operation>
__device__ inline T reduce_block(T value, Operation operation, ReductionSlots& slots) {
  static_assert(sizeof(T) <= kSlotBytes, "a value fits its slot");
  value = reduce_warp(value, operation);
  if (lane() == 0) memcpy(slots.warp[warp()], &value, sizeof(T));
  __syncthreads();
  memcpy(&value, slots.warp[0], sizeof(T));
  for (int i = 1; i < kWarps; ++i) {
    T other;
    memcpy(&other, slots.warp[i], sizeof(T));
    value = operation(value, other);
  }
  __syncthreads();
  return value;
}

template <class Group, class T, class Operation>
__device__ inline T reduce(T value, Operation operation, ReductionSlots& slots) {
  value = reduce_block(value, operation, slots);
  if constexpr (!Group::kIsBlock) {
    if (threadIdx.x == 0) memcpy(slots.block, &value, sizeof(T));
    Group::sync();
    memcpy(&value, Group::at(&slots.block[0], 0), sizeof(T));
    for (int rank = 1; rank < Group::size(); ++rank) {
      T other;
      memcpy(&other, Group::at(&slots.block[0], rank), sizeof(T));
      value = operation(value, other);
    }
    Group::sync();
  }
  return value;
}

// The tokens that a block of the group goes through: whole groups of 32, which share calls of the cipher.
struct Part {
  uint32_t begin, end;

  __device__ static Part of(uint32_t vocab_size, int rank, int size) {
    const uint32_t groups = (vocab_size + 31) / 32;
    const uint32_t each = (groups + size - 1) / size;
    const uint32_t begin = rank * each, end = begin + each;
    return {begin < groups ? 32 * begin : vocab_size, end < groups ? 32 * end : vocab_size};
  }
};

}  // namespace safecode::cuda
