// Where the tensors of a call live and which stream orders it. Every Params of an op with a GPU kernel ends with one.
#pragma once
#include <cstdint>

namespace glmx {

enum class Backend : int32_t { cpu = 0, cuda = 1, hip = 2, simt = 3 };

inline constexpr const char* backend_name(Backend b) {
  return b == Backend::cpu ? "cpu" : b == Backend::cuda ? "cuda" : b == Backend::hip ? "hip" : "simt";
}

// The default is this CPU. simt: memory of this CPU, kernels of a GPU.
struct Device {
  Backend backend = Backend::cpu;
  int32_t index = 0;       // which GPU of the machine
  void* stream = nullptr;  // cudaStream_t or hipStream_t; the caller has made `index` the current device
};

inline bool on_gpu(Device d) { return d.backend != Backend::cpu; }
// Whether the host can look at what the pointers name without waiting: contents of tensors are checked only then. On a GPU a kernel that
// meets a bad index ends the stream with an error instead (gx::require).
inline bool host_reads(Device d) { return d.backend == Backend::cpu || d.backend == Backend::simt; }

}  // namespace glmx
