// CUDA's threads on one thread of a CPU: every thread of a block is a fiber with a stack of its own that runs until it
// waits for others. Barriers, shuffles, clusters and distributed shared memory are real: a thread that does not come to
// a barrier is a deadlock, which is found and reported; the order of threads and blocks can be varied by a seed; under
// ThreadSanitizer each fiber is a thread, so a missing barrier is a data race whatever the order was.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulated {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  Dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

constexpr int kWarpSize = 32;
constexpr size_t kSharedBytes = 48 * 1024;  // what a block has without asking for more
constexpr uint64_t kPoison = 0xA5A5A5A5A5A5A5A5u;

// Where threads wait for each other. `generation` counts how often all have arrived.
struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
  char token[2] = {};  // what ThreadSanitizer synchronises on, in turn
};

struct Block;

struct Warp {
  Barrier barrier;
  uint32_t exchanged[2][kWarpSize];
};

struct Cluster {
  Barrier barrier;
  Block* blocks;
  unsigned size;
};

struct Block {
  Dim3 index;
  Barrier barrier;
  int counted[2];  // __syncthreads_count
  Cluster* cluster;
  unsigned rank;  // in the cluster
  Warp* warps;
  unsigned running;  // threads that have not returned
  alignas(16) unsigned char shared[kSharedBytes];
};

struct Thread {
  Dim3 index;
  Block* block;
  Warp* warp;
  uint64_t cluster_generation;  // when it arrived at the cluster's barrier
  bool fenced;                  // since its last atomic operation
  const void* last_atomic;
  // The scheduler's.
  const Barrier* waits_for;
  uint64_t waits_since;
  bool done;
  void* context;
};

struct Launch {
  Dim3 grid, block;
  unsigned cluster_size;  // 0: no clusters
};

// How a kernel ended.
enum class End { kReturned, kTrapped, kDeadlock, kExitedBlock };

Thread& current();

End run(const Launch& launch, const std::function<void()>& kernel);

// 0: threads and blocks in their order; else an order that the seed determines, with interruptions at atomic
// operations.
void set_schedule(uint64_t seed);

// What device code calls.
void block_barrier();
int block_barrier_count(bool predicate);
uint32_t shuffle(uint32_t value, int from_lane, bool valid);
int lane();
void cluster_arrive();
void cluster_wait();
unsigned char* shared_of_rank(const void* own, unsigned rank);
[[noreturn]] void stop(End end);
void before_atomic(const void* place);
void after_atomic(const void* place);
void fence();

template <class T>
T& block_shared() {
  static_assert(sizeof(T) <= kSharedBytes, "a block has less shared memory");
  return *reinterpret_cast<T*>(current().block->shared);
}

template <class T>
T atomic_add(T* place, T value) {
  before_atomic(place);
  const T old = __atomic_fetch_add(place, value, __ATOMIC_RELAXED);
  after_atomic(place);
  return old;
}

inline uint32_t atomic_increment(uint32_t* place, uint32_t last) {
  before_atomic(place);
  const uint32_t old = __atomic_load_n(place, __ATOMIC_RELAXED);  // one thread of the CPU: nothing comes between
  __atomic_store_n(place, old >= last ? 0 : old + 1, __ATOMIC_RELAXED);
  after_atomic(place);
  return old;
}

}  // namespace emulated
