#include "launch.h"

#include "formats.cuh"

namespace safecode::cuda {
namespace {

// How a row is spread over blocks, by architecture. NOT MEASURED YET (docs/gpu-status.md): these numbers are estimates.
struct Spread {
  int32_t least_capability;
  bool clusters;
  int32_t most_blocks_per_row;        // 8 is the largest cluster that every GPU with clusters accepts
  int32_t blocks_per_multiprocessor;  // rows are split while all blocks fit the device at once, so many on each
  int64_t least_bytes_per_block;      // below this a block waits for the others longer than it reads
};
constexpr Spread kSpreads[] = {
    {90, true, 8, 1, 16 * 1024},
    {0, false, 8, 1, 16 * 1024},
};

const Spread& spread_for(const DeviceFacts& facts) {
  for (const Spread& spread : kSpreads) {
    if (facts.capability >= spread.least_capability && (facts.has_clusters || !spread.clusters)) return spread;
  }
  return kSpreads[1];
}

size_t aligned(size_t bytes) { return (bytes + 15) / 16 * 16; }

// Hands out parts of the scratch; with no base it only counts.
class Scratch {
 public:
  explicit Scratch(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(size_t count) {
    T* place = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ = aligned(used_ + count * sizeof(T));
    return place;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

ScratchSize lay_out(const Plan& plan, void* base, Task& task) {
  const auto rows = static_cast<size_t>(task.rows);
  const size_t records = plan.clusters || plan.blocks_per_row == 1 ? 0 : rows * plan.blocks_per_row;
  const size_t entries = records * kThreads;
  Scratch scratch(base);
  task.slices.tickets = scratch.take<uint32_t>(records ? rows : 0);
  const size_t zeroed = scratch.used();
  task.slices.best = scratch.take<float>(records);
  task.slices.size = scratch.take<int32_t>(records);
  task.slices.token = scratch.take<uint32_t>(entries);
  task.slices.clean = scratch.take<float>(entries);
  task.slices.noised = scratch.take<float>(entries);
  task.dense = scratch.take<float>(rows * task.vocab_size);
  return {zeroed, scratch.used()};
}

}  // namespace

Plan choose_plan(const DeviceFacts& facts, DType dtype, int64_t rows, int64_t vocab_size) {
  const Spread& spread = spread_for(facts);
  const int64_t bytes = vocab_size * (dtype == DType::kFloat32 ? 4 : 2);
  const int64_t resident = int64_t{facts.multiprocessors} * spread.blocks_per_multiprocessor;
  Plan plan{spread.clusters, 1};
  while (2 * plan.blocks_per_row <= spread.most_blocks_per_row && 2 * plan.blocks_per_row * rows <= resident &&
         2 * plan.blocks_per_row * spread.least_bytes_per_block <= bytes) {
    plan.blocks_per_row *= 2;
  }
  return plan;
}

ScratchSize scratch_size(const Plan& plan, int64_t rows, int64_t vocab_size) {
  Task task{};
  task.rows = rows;
  task.vocab_size = static_cast<uint32_t>(vocab_size);
  return lay_out(plan, nullptr, task);
}

void place_scratch(const Plan& plan, void* base, Task& task) { lay_out(plan, base, task); }

cudaError_t launch(DType dtype, Call call, const Plan& plan, const Task& task, cudaStream_t stream) {
  if (dtype == DType::kBFloat16) return launch<BFloat16>(call, plan, task, stream);
  if (dtype == DType::kFloat16) return launch<Float16>(call, plan, task, stream);
  return launch<Float32>(call, plan, task, stream);
}

}  // namespace safecode::cuda
