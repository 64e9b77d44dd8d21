// A jump within one thread but to another stack is what fibers are; glibc's check takes it for a mistake.
#undef _FORTIFY_SOURCE

#include "emulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#if defined(EMULATOR_UNDER_TSAN)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(EMULATOR_UNDER_TSAN) || defined(__SANITIZE_ADDRESS__)
// Sanitizers follow swapcontext; a jump is 20 times as fast, since it makes no system call.
#define EMULATOR_SWAPS_CONTEXTS
#endif

namespace emulated {
namespace {

constexpr size_t kStackBytes = 256 * 1024;  // of address space: pages come when they are touched
constexpr unsigned kConcurrentBlocks = 5;   // without clusters: so many at a time, since none may wait for another

// A place in the code and its stack: a fiber's or the scheduler's.
struct Context {
  ucontext_t start;
  jmp_buf place;
  bool started = false;
};

struct Fiber {
  Context context;
  void* stack = nullptr;
  void* sanitizer = nullptr;
};

void switch_context(Context& from, Context& to) {
#if defined(EMULATOR_SWAPS_CONTEXTS)
  swapcontext(&from.start, &to.start);
#else
  if (_setjmp(from.place)) return;
  if (to.started) _longjmp(to.place, 1);
  to.started = true;
  setcontext(&to.start);
#endif
}

struct State {
  Launch launch;
  const std::function<void()>* kernel = nullptr;
  Thread* thread = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers;  // kept between launches
  Context scheduler;
  void* scheduler_sanitizer = nullptr;
  End end = End::kReturned;
  bool stopped = false;
  uint64_t seed = 0, random = 0;
};

State state;

uint64_t next_random() {  // splitmix64
  uint64_t x = state.random += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

void to_scheduler() {
  auto* fiber = static_cast<Fiber*>(state.thread->context);
#if defined(EMULATOR_UNDER_TSAN)
  __tsan_switch_to_fiber(state.scheduler_sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  switch_context(fiber->context, state.scheduler);
}

void to_fiber(Thread& thread) {
  auto* fiber = static_cast<Fiber*>(thread.context);
  state.thread = &thread;
#if defined(EMULATOR_UNDER_TSAN)
  __tsan_switch_to_fiber(fiber->sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  state.scheduler.started = true;
  switch_context(state.scheduler, fiber->context);
}

void release(void* token) {
#if defined(EMULATOR_UNDER_TSAN)
  __tsan_release(token);
#else
  (void)token;
#endif
}

void acquire(const void* token) {
#if defined(EMULATOR_UNDER_TSAN)
  __tsan_acquire(const_cast<void*>(token));
#else
  (void)token;
#endif
}

// Returns the generation that the caller waits to end.
uint64_t arrive(Barrier& barrier) {
  const uint64_t generation = barrier.generation;
  release(&barrier.token[generation & 1]);
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  return generation;
}

void wait(const Barrier& barrier, uint64_t generation) {
  Thread& thread = current();
  if (barrier.generation == generation) {
    thread.waits_for = &barrier;
    thread.waits_since = generation;
    to_scheduler();
    thread.waits_for = nullptr;
  }
  acquire(&barrier.token[generation & 1]);
}

void run_fiber() {
  acquire(&state.launch);
  (*state.kernel)();
  Thread& thread = current();
  thread.done = true;
  release(thread.block);
  release(&state.launch);
  if (--thread.block->running == 0) {
    acquire(thread.block);
    memset(thread.block->shared, 0xCD, kSharedBytes);  // it is gone
    release(&state.launch);
  }
  to_scheduler();
}

void prepare_fiber(Thread& thread, size_t index) {
  if (state.fibers.size() <= index) {
    state.fibers.push_back(std::make_unique<Fiber>());
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) {
      perror("emulator: no memory for a stack");
      abort();
    }
    state.fibers.back()->stack = stack;
  }
  Fiber& fiber = *state.fibers[index];
  Context& context = fiber.context;
  context.started = false;
  getcontext(&context.start);
  context.start.uc_stack.ss_sp = fiber.stack;
  context.start.uc_stack.ss_size = kStackBytes;
  context.start.uc_link = nullptr;
  makecontext(&context.start, run_fiber, 0);
#if defined(EMULATOR_UNDER_TSAN)
  if (!fiber.sanitizer) fiber.sanitizer = __tsan_create_fiber(0);
#endif
  thread.context = &fiber;
}

// Blocks that run at the same time.
struct Wave {
  std::vector<Block> blocks;
  std::vector<Warp> warps;
  std::vector<Thread> threads;
  Cluster cluster;
};

void set_up(Wave& wave, const std::vector<unsigned>& indices) {
  const unsigned threads = state.launch.block.x;
  const unsigned warps = (threads + kWarpSize - 1) / kWarpSize;
  wave.blocks.resize(indices.size());
  wave.warps.assign(indices.size() * warps, Warp{});
  wave.threads.assign(indices.size() * threads, Thread{});
  wave.cluster = Cluster{};
  wave.cluster.blocks = wave.blocks.data();
  wave.cluster.size = static_cast<unsigned>(indices.size());
  wave.cluster.barrier.expected = static_cast<int>(indices.size() * threads);
  for (size_t b = 0; b < indices.size(); ++b) {
    Block& block = wave.blocks[b];
    block.index = Dim3(indices[b]);
    block.barrier = Barrier{};
    block.barrier.expected = static_cast<int>(threads);
    block.counted[0] = block.counted[1] = 0;
    block.cluster = state.launch.cluster_size ? &wave.cluster : nullptr;
    block.rank = static_cast<unsigned>(b);
    block.warps = &wave.warps[b * warps];
    block.running = threads;
    for (size_t i = 0; i < kSharedBytes; i += sizeof(kPoison)) memcpy(block.shared + i, &kPoison, sizeof(kPoison));
    for (unsigned t = 0; t < threads; ++t) {
      Thread& thread = wave.threads[b * threads + t];
      thread.index = Dim3(t);
      thread.block = &block;
      thread.warp = &block.warps[t / kWarpSize];
      ++thread.warp->barrier.expected;
      prepare_fiber(thread, b * threads + t);
    }
  }
}

bool is_waiting(const Thread& thread) {
  return thread.waits_for && thread.waits_for->generation == thread.waits_since;
}

void run_wave(std::vector<Thread>& threads) {
  const size_t count = threads.size();
  for (size_t left = count; left && !state.stopped;) {
    bool progress = false;
    // Every order from a random start with a random odd stride; the count is a multiple of 32.
    const size_t start = state.seed ? next_random() % count : 0;
    size_t stride = 1;
    if (state.seed) {
      do {
        stride = next_random() % count | 1;
      } while (std::gcd(stride, count) != 1);
    }
    for (size_t i = 0; i < count && !state.stopped; ++i) {
      Thread& thread = threads[(start + i * stride) % count];
      if (thread.done || is_waiting(thread)) continue;
      to_fiber(thread);
      progress = true;
      left -= thread.done;
    }
    if (!progress && !state.stopped) {
      fprintf(stderr, "emulator: %zu threads wait at barriers that others do not come to\n", left);
      state.end = End::kDeadlock;
      state.stopped = true;
    }
  }
  state.thread = nullptr;
}

}  // namespace

Thread& current() { return *state.thread; }

void set_schedule(uint64_t seed) { state.seed = state.random = seed; }

End run(const Launch& launch, const std::function<void()>& kernel) {
  state.launch = launch;
  state.kernel = &kernel;
  state.end = End::kReturned;
  state.stopped = false;
#if defined(EMULATOR_UNDER_TSAN)
  state.scheduler_sanitizer = __tsan_get_current_fiber();
#endif
  const unsigned at_a_time = launch.cluster_size ? launch.cluster_size : kConcurrentBlocks;
  std::vector<unsigned> order((launch.grid.x + at_a_time - 1) / at_a_time);
  std::iota(order.begin(), order.end(), 0u);
  for (size_t i = order.size(); state.seed && i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
  static Wave wave;
  for (const unsigned group : order) {
    std::vector<unsigned> indices;
    for (unsigned b = group * at_a_time; b < (group + 1) * at_a_time && b < launch.grid.x; ++b) indices.push_back(b);
    set_up(wave, indices);
    release(&state.launch);
    run_wave(wave.threads);
    acquire(&state.launch);
    if (state.stopped) break;
  }
  return state.end;
}

void block_barrier() { block_barrier_count(false); }

int block_barrier_count(bool predicate) {
  Block& block = *current().block;
  const uint64_t half = block.barrier.generation & 1;
  block.counted[half] += predicate;
  const uint64_t generation = arrive(block.barrier);
  if (block.barrier.generation != generation) block.counted[half ^ 1] = 0;  // for the next barrier
  wait(block.barrier, generation);
  return block.counted[half];
}

int lane() { return static_cast<int>(current().index.x % kWarpSize); }

uint32_t shuffle(uint32_t value, int from_lane, bool valid) {
  Warp& warp = *current().warp;
  uint32_t* exchanged = warp.exchanged[warp.barrier.generation & 1];
  exchanged[lane()] = value;
  wait(warp.barrier, arrive(warp.barrier));
  return valid ? exchanged[from_lane] : value;
}

void cluster_arrive() {
  Thread& thread = current();
  thread.cluster_generation = arrive(thread.block->cluster->barrier);
}

void cluster_wait() {
  Thread& thread = current();
  wait(thread.block->cluster->barrier, thread.cluster_generation);
}

unsigned char* shared_of_rank(const void* own, unsigned rank) {
  const Block& block = *current().block;
  const auto offset = static_cast<const unsigned char*>(own) - block.shared;
  if (offset < 0 || offset >= static_cast<ptrdiff_t>(kSharedBytes) || rank >= block.cluster->size) {
    fprintf(stderr, "emulator: map_shared_rank outside of shared memory or of the cluster\n");
    abort();
  }
  Block& other = block.cluster->blocks[rank];
  if (other.running == 0) {
    fprintf(stderr, "emulator: block %u reaches into block %u, which has exited\n", block.rank, rank);
    stop(End::kExitedBlock);
  }
  return other.shared + offset;
}

void stop(End end) {
  state.end = end;
  state.stopped = true;
  to_scheduler();
  abort();  // a stopped thread is never resumed
}

void before_atomic(const void* place) {
  if (state.seed && next_random() % 4 == 0) to_scheduler();
  if (current().fenced) release(const_cast<void*>(place));
}

void after_atomic(const void* place) {
  Thread& thread = current();
  thread.fenced = false;
  thread.last_atomic = place;
}

void fence() {
  Thread& thread = current();
  thread.fenced = true;
  if (thread.last_atomic) acquire(thread.last_atomic);
}

}  // namespace emulated
