// The emulated GPU as CUDA's runtime shows it, and what a test sets: the device, the schedule, a launch that fails.
#include "cuda_runtime.h"

namespace {

struct Device {
  int count = 1, current = 0;
  int capability = 90;
  int multiprocessors = 4;
  cudaError_t next_error = cudaSuccess;  // of the next launch
  cudaError_t last_error = cudaSuccess;
};

Device device;

}  // namespace

extern "C" {
__attribute__((visibility("default"))) void emulated_set_device(int count, int capability, int multiprocessors) {
  device.count = count;
  device.capability = capability;
  device.multiprocessors = multiprocessors;
}
__attribute__((visibility("default"))) void emulated_set_schedule(uint64_t seed) { emulated::set_schedule(seed); }
__attribute__((visibility("default"))) void emulated_fail_next_launch(int error) {
  device.next_error = static_cast<cudaError_t>(error);
}
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = device.count;
  return device.count ? cudaSuccess : cudaErrorNoDevice;
}

cudaError_t cudaGetDevice(int* current) {
  *current = device.current;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int wanted) {
  if (wanted < 0 || wanted >= device.count) return cudaErrorInvalidDevice;
  device.current = wanted;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int wanted) {
  if (wanted < 0 || wanted >= device.count) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = device.multiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = device.capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device.capability % 10;
      break;
    case cudaDevAttrClusterLaunch:
      *value = device.capability >= 90;
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    default:
      return "unknown error";
  }
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = device.last_error;
  device.last_error = cudaSuccess;
  return error;
}

cudaError_t emulated_launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  cudaError_t error = device.next_error;
  device.next_error = cudaSuccess;
  const unsigned cluster = config.numAttrs ? config.attrs[0].val.clusterDim.x : 0;
  const bool legal = config.gridDim.x && config.blockDim.x && config.blockDim.x <= 1024 &&
                     (!cluster || (cluster <= 8 && config.gridDim.x % cluster == 0 && device.capability >= 90));
  if (!error && !legal) error = cudaErrorInvalidConfiguration;
  if (!error && emulated::run({config.gridDim, config.blockDim, cluster}, kernel) != emulated::End::kReturned) {
    error = cudaErrorLaunchFailure;
  }
  device.last_error = error;
  return error;
}
