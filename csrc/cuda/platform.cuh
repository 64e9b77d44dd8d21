// What the kernels need of the CUDA toolkit. tests/cpp/emulation has headers of the same names that stand in for it, so
// that the very same kernels run on a CPU.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "../row_math.h"
#include "task.h"

// Clusters exist from sm_90 on. A kernel that needs them keeps its symbol and loses its body below, since the launcher
// names it for every architecture.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define SAFECODE_HAS_CLUSTERS 1
#endif

// The shared memory of the kernels is one struct: shared() gives it to every function, called or inlined, without an
// address that would take registers.
#if defined(__CUDACC__)
#define SAFECODE_SHARED_MEMORY(Type)  \
  static __shared__ Type the_shared; \
  __device__ inline Type& shared() { return the_shared; }
#else
#define SAFECODE_SHARED_MEMORY(Type) \
  inline Type& shared() { return emulated::block_shared<Type>(); }
#endif

namespace safecode::cuda {

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ inline int warp() { return static_cast<int>(threadIdx.x) / kWarpSize; }

// The larger one; NaN if either is.
__device__ inline float max_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a != a || a > b ? a : b;
#endif
}

// Values of any type cross threads word by word.
template <class T>
__device__ inline T shuffle_xor(T value, int offset) {
  static_assert(sizeof(T) % 4 == 0, "whole words");
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (uint32_t& word : words) word = __shfl_xor_sync(kAllLanes, word, offset);
  memcpy(&value, words, sizeof(T));
  return value;
}

template <class T>
__device__ inline T shuffle_up(T value, int offset) {
  static_assert(sizeof(T) % 4 == 0, "whole words");
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (uint32_t& word : words) word = __shfl_up_sync(kAllLanes, word, offset);
  memcpy(&value, words, sizeof(T));
  return value;
}

}  // namespace safecode::cuda
