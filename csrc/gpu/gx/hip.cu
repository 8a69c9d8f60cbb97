// gx on HIP, host side: what the cards of this machine are.
#include <mutex>

#include "gpu/gx/gx.h"

namespace gx {
namespace {
constexpr int kMaxDevices = 64;

// "gfx942:sramecc+:xnack-" is 942, "gfx90a:..." 910.
int architecture_of(const char* name) {
  int value = 0;
  for (const char* c = name + std::strlen("gfx"); *c != '\0' && *c != ':'; ++c) value = value * 10 + (*c >= 'a' ? *c - 'a' + 10 : *c - '0');
  return value;
}
}  // namespace

int device_count() {
  int count = 0;
  return hipGetDeviceCount(&count) == hipSuccess ? count : 0;
}

std::string device_name(int index) {
  hipDeviceProp_t all;
  check("device", hipGetDeviceProperties(&all, index));
  return all.name;
}

const Properties& properties(int index) {
  static Properties known[kMaxDevices];
  static std::once_flag asked[kMaxDevices];
  GLMX_CHECK(index >= 0 && index < kMaxDevices, "device: expected an index in [0, ", kMaxDevices, "): got ", index);
  std::call_once(asked[index], [index] {
    hipDeviceProp_t all;
    check("device", hipGetDeviceProperties(&all, index));
    known[index] = {all.multiProcessorCount, architecture_of(all.gcnArchName), static_cast<int>(all.sharedMemPerBlock)};
  });
  return known[index];
}

}  // namespace gx
