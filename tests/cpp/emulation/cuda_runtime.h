// Stands in for the CUDA toolkit's header of this name; see emulator.h. Only what csrc/cuda and its driver use.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "emulator.h"

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

// ---- device ----

#define threadIdx (emulated::current().index)
#define blockIdx (emulated::current().block->index)

using dim3 = emulated::Dim3;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline void __syncthreads() { emulated::block_barrier(); }
inline int __syncthreads_count(int predicate) { return emulated::block_barrier_count(predicate != 0); }
inline void __threadfence() { emulated::fence(); }
[[noreturn]] inline void __trap() { emulated::stop(emulated::End::kTrapped); }

inline uint32_t __shfl_xor_sync(uint32_t, uint32_t value, int offset) {
  return emulated::shuffle(value, emulated::lane() ^ offset, true);
}
inline uint32_t __shfl_up_sync(uint32_t, uint32_t value, int offset) {
  return emulated::shuffle(value, emulated::lane() - offset, emulated::lane() >= offset);
}

template <class T>
T atomicAdd(T* place, T value) {
  return emulated::atomic_add(place, value);
}

// Back to 0 after `last`.
inline uint32_t atomicInc(uint32_t* place, uint32_t last) { return emulated::atomic_increment(place, last); }

template <class T>
T __ldg(const T* place) {
  T value;
  memcpy(&value, place, sizeof(T));
  return value;
}
template <class T>
T __ldcg(const T* place) {
  return __ldg(place);
}

inline int __popc(uint32_t value) { return __builtin_popcount(value); }
inline int __clz(int value) { return value ? __builtin_clz(static_cast<unsigned>(value)) : 32; }
inline int __clzll(long long value) { return value ? __builtin_clzll(static_cast<unsigned long long>(value)) : 64; }
inline float __log2f(float x) { return log2f(x); }

// ---- host ----

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
  cudaErrorUnknown = 999,
};

using cudaStream_t = void*;

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrClusterLaunch = 120,
};

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t emulated_launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);

inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaMalloc(void** place, size_t bytes) {
  *place = malloc(bytes);
  if (*place) memset(*place, 0xA5, bytes);  // what no result may be
  return *place || !bytes ? cudaSuccess : cudaErrorUnknown;
}
inline cudaError_t cudaFree(void* place) {
  free(place);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void* place, int value, size_t bytes) {
  memset(place, value, bytes);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  return emulated_launch(*config, [&] { kernel(arguments...); });
}
