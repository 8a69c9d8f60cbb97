// The library's fragment root: op namespaces, the thread pool that the core borrows from torch, scratch buffers.
#include <torch/csrc/stable/ops.h>

#include <utility>
#include <vector>

#include "core/parallel.h"
#include "torch/bind.h"

namespace glmx::bind {

Tensor workspace(const Tensor& like, DType dtype, int64_t elements) {
  const ScalarType type = dtype == DType::f64   ? ScalarType::Double
                          : dtype == DType::f32 ? ScalarType::Float
                          : dtype == DType::i32 ? ScalarType::Int
                                                : ScalarType::Byte;
  return torch::stable::new_empty(like, {elements}, type);
}

namespace {

struct Task {
  void (*run)(void*, int64_t);
  void* context;
};

void run_range(int64_t begin, int64_t end, void* task_pointer) {
  const Task& task = *static_cast<const Task*>(task_pointer);
  for (int64_t i = begin; i < end; ++i) task.run(task.context, i);
}

int64_t torch_threads() {
  uint32_t n = 1;
  return torch_get_num_threads(&n) == 0 ? n : 1;
}

void torch_run(int64_t workers, void (*run)(void*, int64_t), void* context) {
  Task task{run, context};
  GLMX_CHECK(torch_parallel_for(0, workers, 1, run_range, &task) == 0, "torch_parallel_for failed");
}

// The recording in progress holds for as long as none of these tensors has moved.
void watch(std::vector<Tensor> tensors) {
  Recording* const recording = Recording::active();
  GLMX_CHECK(recording != nullptr, "watch: expected a recording in progress: got none");
  std::vector<std::pair<Tensor, void*>> watched;
  for (const Tensor& tensor : tensors) watched.emplace_back(tensor, tensor.data_ptr());
  recording->ask_first([watched] {
    for (const auto& [tensor, address] : watched) {
      if (tensor.data_ptr() != address) return false;
    }
    return true;
  });
}

const bool installed = [] {
  install_thread_pool({torch_threads, torch_run});
  return true;
}();

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY(glmx, m) { m.def("watch(Tensor[] tensors) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(glmx, CPU, m) { m.impl("watch", TORCH_BOX(&glmx::bind::watch)); }
