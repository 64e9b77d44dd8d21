// What one launch works on, as plain data that a kernel receives by value. B rows, V tokens; strides count elements;
// every address lies on the device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../decode_step.h"

// Threads of a block, and with them the most candidates that a row may have without going the dense way. The emulation
// on a CPU takes fewer.
#ifndef SAFECODE_CUDA_THREADS
#define SAFECODE_CUDA_THREADS 512
#endif

namespace safecode::cuda {

constexpr int kThreads = SAFECODE_CUDA_THREADS;
constexpr int kWarpSize = 32;
constexpr int kWarps = kThreads / kWarpSize;
static_assert(kThreads % kWarpSize == 0 && kThreads >= 2 * kWarpSize, "whole warps, and more than one");

struct LogitMatrix {
  const void* data;  // null: not given
  int64_t row_stride;
};

// What the blocks of a row leave for the last one of them, in the form without clusters. Entries [B, S, kThreads].
struct SliceRecords {
  float* best;      // [B, S] largest lifted logit of the slice, NaN if there is a NaN
  int32_t* size;    // [B, S] entries that follow; more than kThreads: they did not fit
  uint32_t* token;  // of each entry, with its mark
  float* clean;
  float* noised;
  uint32_t* tickets;  // [B] blocks that are done; zero before and after every launch
};

struct Task {
  int64_t rows;
  uint32_t vocab_size;
  LogitMatrix clean, noised;

  const double* packed;  // see unpack_row; null: no contrast, no bias, no filter
  const int32_t* words;  // [n_masks, ceil(V / 32)]
  int64_t n_masks;
  const int64_t* mask_ids;  // [B]; null: mask 0 for every row, none if there are no masks
  const int64_t* seeds;     // [B]; null: every row is greedy
  const int64_t* streams;
  const int64_t* step_of_row;  // [B]; null: `step` for every row
  uint64_t step;

  // The results of a decode step.
  int64_t* token;
  float* logprob;
  int32_t* n_kept;
  int32_t* status;
  // The results of scores mode [B, V], besides the status.
  float* scores;
  float* biased_clean;
  uint8_t* keep;

  int32_t blocks_per_row;  // S

  // Scratch.
  float* dense;  // [B, V]
  SliceRecords slices;
};

}  // namespace safecode::cuda
