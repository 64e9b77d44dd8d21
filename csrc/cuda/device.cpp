#include "device.h"

#include <algorithm>
#include <cstdlib>

#ifndef SAFECODE_CUDA_ARCHITECTURES
#error "CMakeLists.txt says which architectures are built"
#endif

namespace safecode::cuda {
namespace {

// Whether code for one architecture of the list ("90a-real", "120") runs on a device. Machine code runs on the same
// major version from its minor one on, with the suffix "a" on exactly that version; PTX, which a name without "-real"
// adds, runs on everything newer.
bool serves(const std::string& architecture, int capability) {
  char* suffix = nullptr;
  const auto built = static_cast<int>(std::strtol(architecture.c_str(), &suffix, 10));
  if (*suffix == 'a') return built == capability;
  if (built / 10 == capability / 10 && built <= capability) return true;
  return *suffix == '\0' && built <= capability;
}

bool is_built_for(int capability) {
  const std::string all = architectures();
  for (size_t begin = 0; begin <= all.size();) {
    const size_t end = std::min(all.find(',', begin), all.size());
    if (serves(all.substr(begin, end - begin), capability)) return true;
    begin = end + 1;
  }
  return false;
}

std::string why_unusable_one(int device) {
  DeviceFacts facts{};
  const cudaError_t error = read_facts(device, facts);
  if (error != cudaSuccess) return std::string("GPU ") + std::to_string(device) + ": " + cudaGetErrorString(error);
  if (is_built_for(facts.capability)) return "";
  return "GPU " + std::to_string(device) + " has compute capability " + std::to_string(facts.capability / 10) + "." +
         std::to_string(facts.capability % 10) + ", and the module is built for " + architectures() +
         "; install with SAFECODE_CUDA=on";
}

}  // namespace

cudaError_t read_facts(int device, DeviceFacts& facts) {
  int major = 0, minor = 0, clusters = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (!error) error = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
  if (!error) error = cudaDeviceGetAttribute(&facts.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  facts.capability = 10 * major + minor;
  facts.has_clusters = clusters != 0;
  return error;
}

const char* architectures() { return SAFECODE_CUDA_ARCHITECTURES; }

std::string why_unusable(int device) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return std::string("CUDA finds no GPU or no driver (") + cudaGetErrorString(error) + ")";
  if (device >= 0) return why_unusable_one(device);
  std::string reason = "CUDA finds no GPU";
  for (int one = 0; one < count; ++one) {
    reason = why_unusable_one(one);
    if (reason.empty()) break;
  }
  return reason;
}

OnDevice::OnDevice(int device) {
  error_ = cudaGetDevice(&before_);
  if (error_ != cudaSuccess || before_ == device) return;
  error_ = cudaSetDevice(device);
  changed_ = error_ == cudaSuccess;
}

OnDevice::~OnDevice() {
  if (changed_) cudaSetDevice(before_);
}

}  // namespace safecode::cuda
