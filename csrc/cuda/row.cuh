// What a block keeps in shared memory while it works on a row.
#pragma once

#include "formats.cuh"
#include "group.cuh"

namespace safecode::cuda {

constexpr int kScanCapacity = 4 * kThreads;  // candidates that a block may meet while its maximum still rises
constexpr int kBins = 1024;                  // of a histogram over a range of keys
constexpr int kBinBits = 10;

// A row's parameters.
struct Row {
  int64_t index;
  uint32_t vocab_size;
  float bias;            // 0 for a row without a mask
  float lift;            // what of it the gathering knows: without a scope all of the mask is biased
  const int32_t* words;  // of its mask
  RowParams params;
  DrawKey draw;  // unless it is greedy
  bool greedy;
  bool contrasts;

  // With a scope it is not known before who is biased: what could pass is gathered.
  __device__ Gather gather() const { return gather_of(lift != 0 ? 0.0f : bias, params.log_beta); }
  __device__ float lifted(float clean, bool is_refusal) const { return is_refusal ? clean + lift : clean; }
  __device__ bool is_dense() const { return params.log_beta == -kInfinity; }  // beta 0
  // What a biased clean logit must reach, given the best one that is allowed.
  __device__ float cut(float best) const { return is_dense() ? -kInfinity : best + params.log_beta; }
  __device__ bool is_scoped() const { return bias != 0 && params.scope > 0; }
};

constexpr uint32_t kRefusal = 0x80000000u;  // marks a token of the mask; tokens themselves lie below

// What a block found in its part of the clean row: a superset of its candidates, since the threshold only rises.
struct Found {
  int32_t size;
  uint32_t token[kScanCapacity];  // with their mark
  float clean[kScanCapacity];
};

// The candidates of the whole row, at most one per thread.
struct Candidates {
  int32_t size;  // more than kThreads: they did not fit
  uint32_t token[kThreads];  // with their mark
  float clean[kThreads];
  float noised[kThreads];
};

// A row that is worked on as a whole.
struct Dense {
  Part part;
  const void* clean;
  const void* noised;
  float raise, floor;    // what is gathered
  uint32_t scope_limit;  // descending key of the last score that is biased
  float* scores;         // [V]
  float best;            // largest of the finished scores
  TokenOrder order;
};

// How many tokens fall into a bin and what they weigh, in words: these have fast atomics.
struct Histogram {
  uint32_t tokens[kBins];
  uint32_t low[kBins], middle[kBins], high[kBins];
};

struct Crossing {
  int32_t bin;  // -1: the goal lies beyond all bins
  uint32_t tokens;
  Mass before;
};

struct Shared {
  Row row;
  ReductionSlots slots;
  union {
    Found found;          // until the candidates are gathered
    Histogram histogram;  // after
  };
  Candidates candidates;
  union {
    uint64_t keys[kThreads];  // until they are sorted
    double shares[kThreads];  // after
  };
  uint64_t sorted[kThreads];
  float warp_best[2][kWarps];
  // For the other blocks of the row.
  float best;
  uint32_t fits;
  uint32_t is_last;
  Dense dense;
  Crossing crossing;
};

SAFECODE_SHARED_MEMORY(Shared)

template <class T, class Operation>
__device__ inline T reduce_block(T value, Operation operation) {
  return reduce_block(value, operation, shared().slots);
}

template <class Group, class T, class Operation>
__device__ inline T reduce(T value, Operation operation) {
  return reduce<Group>(value, operation, shared().slots);
}

// The words of the row's mask, null for a row without one.
__device__ inline const int32_t* mask_of_row(const Task& task, int64_t row) {
  const int64_t id = task.mask_ids ? task.mask_ids[row] : task.n_masks ? 0 : -1;
  if (id < -1 || id >= task.n_masks) __trap();  // as torch does it on a GPU: no error could name the row from here
  return id < 0 ? nullptr : task.words + id * ((int64_t{task.vocab_size} + 31) / 32);
}

__device__ inline RowParams params_of_row(const Task& task, int64_t row) {
  if (task.packed) return unpack_row(task.packed, task.rows, row);
  return {0.0f, 1.0f, 0.0f, -kInfinity, 1.0f, -kInfinity, 1.0, 0, 0, task.seeds == nullptr};
}

__device__ inline DrawKey draw_of_row(const Task& task, int64_t row) {
  if (!task.seeds) return {0, 0, 0};
  const uint64_t step = task.step_of_row ? static_cast<uint64_t>(task.step_of_row[row]) : task.step;
  return {static_cast<uint64_t>(task.seeds[row]), static_cast<uint32_t>(task.streams[row]), step};
}

// Begins the work of a block on a row. Ends with a barrier.
__device__ inline void begin_row(const Task& task, int64_t index) {
  if (threadIdx.x == 0) {
    Row row;
    row.index = index;
    row.vocab_size = task.vocab_size;
    row.words = mask_of_row(task, index);
    row.params = params_of_row(task, index);
    row.bias = row.words ? row.params.bias : 0.0f;
    row.lift = row.params.scope > 0 || row.is_dense() ? 0.0f : row.bias;
    row.draw = draw_of_row(task, index);
    row.greedy = row.params.greedy || !task.seeds;
    row.contrasts = task.noised.data && row.params.weight != 0;
    shared().row = row;
    shared().found.size = shared().candidates.size = 0;
  }
  __syncthreads();
}

__device__ inline void store(const Task& task, int64_t row, const RowResult& result) {
  task.token[row] = result.token;
  task.logprob[row] = result.logprob;
  task.n_kept[row] = result.n_kept;
  task.status[row] = static_cast<int32_t>(result.status);
}

__device__ inline RowResult failed(Status status) { return {0, -kInfinity, 0, status}; }

}  // namespace safecode::cuda
