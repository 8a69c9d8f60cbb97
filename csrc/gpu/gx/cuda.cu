// gx on CUDA, host side: what the cards of this machine are.
#include <map>
#include <mutex>
#include <utility>

#include "gpu/gx/gx.h"

namespace gx {
namespace {
constexpr int kMaxDevices = 64;
}

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

std::string device_name(int index) {
  cudaDeviceProp all;
  check("device", cudaGetDeviceProperties(&all, index));
  return all.name;
}

void allow_shared(const char* name, const void* kernel, size_t bytes, int device) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  const std::lock_guard lock(mutex);
  size_t& limit = allowed[{kernel, device}];
  if (bytes <= limit) return;
  check(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  limit = bytes;
}

const Properties& properties(int index) {
  static Properties known[kMaxDevices];
  static std::once_flag asked[kMaxDevices];
  GLMX_CHECK(index >= 0 && index < kMaxDevices, "device: expected an index in [0, ", kMaxDevices, "): got ", index);
  std::call_once(asked[index], [index] {
    const auto ask = [index](cudaDeviceAttr attribute) {
      int value = 0;
      check("device", cudaDeviceGetAttribute(&value, attribute, index));
      return value;
    };
    known[index] = {ask(cudaDevAttrMultiProcessorCount),
                    ask(cudaDevAttrComputeCapabilityMajor) * 10 + ask(cudaDevAttrComputeCapabilityMinor),
                    ask(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  });
  return known[index];
}

}  // namespace gx
