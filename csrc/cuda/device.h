// The GPUs of this machine, and whether this build has code for them. Host code.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

namespace safecode::cuda {

struct DeviceFacts {
  int32_t capability;  // 90 for compute capability 9.0
  bool has_clusters;
  int32_t multiprocessors;
};

cudaError_t read_facts(int device, DeviceFacts& facts);

// What this build holds code for, as CMake lists architectures: "80-real,90a-real,120".
const char* architectures();

// Empty if this build can run on the device, or on any device for -1; else a sentence fragment that says why not.
std::string why_unusable(int device);

// Makes a device the current one of this thread, and afterwards the one that it was.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_;
  bool changed_ = false;
  cudaError_t error_;
};

}  // namespace safecode::cuda
