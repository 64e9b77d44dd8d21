// How a decode step is launched: how many blocks per row and in which form, what scratch it needs. Host code.
#pragma once

#include "device.h"
#include "task.h"

namespace safecode::cuda {

struct Plan {
  bool clusters;
  int32_t blocks_per_row;  // in scores mode without clusters it is 1
};

Plan choose_plan(const DeviceFacts& facts, DType dtype, int64_t rows, int64_t vocab_size);

// The scratch of a plan: one allocation, whose first bytes must be zero before the first launch.
struct ScratchSize {
  size_t zeroed, all;
};

ScratchSize scratch_size(const Plan& plan, int64_t rows, int64_t vocab_size);

// Sets the addresses of the scratch, from a base that is a multiple of 16.
void place_scratch(const Plan& plan, void* base, Task& task);

enum class Call { kDecode, kScores };

// Launches on the current device. An error may also be one that an earlier kernel has left.
cudaError_t launch(DType dtype, Call call, const Plan& plan, const Task& task, cudaStream_t stream);

template <class Format>
cudaError_t launch(Call call, const Plan& plan, const Task& task, cudaStream_t stream);

}  // namespace safecode::cuda
