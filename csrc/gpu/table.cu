// The table of this backend's kernels, installed when the library that holds it is loaded.
#include "gpu/gx/gx.h"
#include "gpu/kernels.h"

namespace glmx::gpu {
const char* grouped_gemm_path(int index, DType dtype) __attribute__((weak));  // grouped_gemm.cu

// Weak: the address of a kernel that this backend's library does not hold is null, and so is its entry.
#define GLMX_GPU_WEAK(name, Params) void name(const Params& p) __attribute__((weak));
GLMX_GPU_KERNELS(GLMX_GPU_WEAK)
#undef GLMX_GPU_WEAK

namespace {
const bool installed = [] {
  Kernels table{};
#define GLMX_GPU_FILL(name, Params) table.name = name;
  GLMX_GPU_KERNELS(GLMX_GPU_FILL)
#undef GLMX_GPU_FILL
  table.device_count = gx::device_count;
  table.device_name = gx::device_name;
  table.architecture = [](int index) { return gx::properties(index).architecture; };
  table.grouped_gemm_path = grouped_gemm_path;
  install(gx::kBackend, table);
  return true;
}();
}  // namespace
}  // namespace glmx::gpu
