// Where a call runs: its device, its stream, and that all of its tensors are there.
#include <dlfcn.h>

#include "gpu/kernels.h"
#include "torch/bind.h"

namespace glmx::bind {
namespace {

thread_local const Call* active = nullptr;

std::string device_name(const Device& d) { return host_reads(d) ? "cpu" : "cuda:" + std::to_string(d.index); }

// torch 2.11 and 2.12 tell their current stream in the GPU's own library, later ones in libtorch_cpu.so. Neither name may be linked: the
// first is not in a CPU build of torch, the second not in torch 2.11. torch's libraries are loaded, but their names are not global.
template <class Fn>
Fn* find(const char* library, const char* name) {
  void* const handle = dlopen(library, RTLD_NOW | RTLD_NOLOAD);
  return handle == nullptr ? nullptr : reinterpret_cast<Fn*>(dlsym(handle, name));
}

void* current_stream(int32_t index) {
  using OfDevice = AOTITorchError(int32_t, void**);
  using Current = AOTITorchError(int32_t, StreamHandle*);
  using Native = AOTITorchError(StreamHandle, void**);
  using Delete = AOTITorchError(StreamHandle);
  static OfDevice* const of_device = [] {
    OfDevice* const cuda = find<OfDevice>("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream");
    return cuda != nullptr ? cuda : find<OfDevice>("libtorch_hip.so", "aoti_torch_get_current_cuda_stream");
  }();
  void* stream = nullptr;
  if (of_device != nullptr) {
    GLMX_CHECK(of_device(index, &stream) == 0, "torch does not tell its current stream of cuda:", index);
    return stream;
  }
  static Current* const current = find<Current>("libtorch_cpu.so", "aoti_torch_get_current_stream");
  static Native* const native = find<Native>("libtorch_cpu.so", "torch_stream_native_handle");
  static Delete* const destroy = find<Delete>("libtorch_cpu.so", "aoti_torch_delete_stream");
  GLMX_CHECK(current != nullptr && native != nullptr && destroy != nullptr, "this torch tells no current stream: it has no GPU");
  StreamHandle handle = nullptr;
  GLMX_CHECK(current(index, &handle) == 0, "torch does not tell its current stream of cuda:", index);
  const bool told = native(handle, &stream) == 0;
  destroy(handle);
  GLMX_CHECK(told, "torch does not tell its current stream of cuda:", index);
  return stream;
}

}  // namespace

std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another device";
}

Call::Call(const Tensor& like, const char* name) : name_(name) {
  if (like.is_cpu()) {
    if (gpu::kernels(Backend::simt) != nullptr) device_.backend = Backend::simt;
  } else {
    GLMX_CHECK(like.is_cuda(), name, ": expected a tensor on the CPU or on a GPU");
    device_.backend = gpu::kernels(Backend::hip) != nullptr ? Backend::hip : Backend::cuda;
    device_.index = like.get_device_index();
    guard_.emplace(device_.index);
    device_.stream = current_stream(device_.index);
  }
  active = this;
}

Call::~Call() { active = nullptr; }

void Call::check_device(const Tensor& t, const char* name) {
  if (active == nullptr) {
    GLMX_CHECK(t.is_cpu(), name, ": expected a CPU tensor: got one on ", bind::device_name(t), ", where this op has no kernel");
    return;
  }
  const Device& device = active->device_;
  const bool there = host_reads(device) ? t.is_cpu() : t.is_cuda() && t.get_device_index() == device.index;
  GLMX_CHECK(there, name, ": expected a tensor on ", device_name(device), ", as ", active->name_, " is: got ", bind::device_name(t));
}

}  // namespace glmx::bind
