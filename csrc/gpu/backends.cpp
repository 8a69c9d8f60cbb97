// The GPU backends of this process.
#include "gpu/kernels.h"

namespace glmx::gpu {
namespace {
constexpr int kBackends = 4;
Kernels* slot(Backend backend) {
  static Kernels tables[kBackends];
  return &tables[static_cast<int>(backend)];
}
bool& installed(Backend backend) {
  static bool flags[kBackends];
  return flags[static_cast<int>(backend)];
}
}  // namespace

void install(Backend backend, const Kernels& kernels) {
  *slot(backend) = kernels;
  installed(backend) = true;
}

const Kernels* kernels(Backend backend) { return installed(backend) ? slot(backend) : nullptr; }

}  // namespace glmx::gpu
