// The entry points of every GPU kernel. A GPU backend (CUDA or HIP, compiled into the core; SIMT, a library that tests load) fills one
// table with its own and installs it; ops/<op>.cpp calls through it.
#pragma once
#include <string>

#include "core/check.h"
#include "glmx/device.h"
#include "glmx/ops.h"

// One line per kernel: its name and its Params. Null in a backend's table: this backend has no such kernel.
#define GLMX_GPU_KERNELS(X)                            \
  X(route_topk, RouteTopkParams)                       \
  X(route_topk_backward, RouteTopkBackwardParams)      \
  X(expert_plan, ExpertPlanParams)                     \
  X(grouped_gemm, GroupedGemmParams)                   \
  X(grouped_gemm_dgrad, GroupedGemmDgradParams)        \
  X(grouped_gemm_wgrad, GroupedGemmWgradParams)        \
  X(grouped_gemm_bias_grad, GroupedGemmBiasGradParams) \
  X(moe_combine, MoeCombineParams)                     \
  X(moe_combine_backward, MoeCombineBackwardParams)    \
  X(rms_norm, RmsNormParams)                           \
  X(rms_norm_backward, RmsNormBackwardParams)          \
  X(add_rms_norm, AddRmsNormParams)                    \
  X(layer_norm, LayerNormParams)                       \
  X(layer_norm_backward, LayerNormBackwardParams)      \
  X(silu_mul, SiluMulParams)                           \
  X(silu_mul_backward, SiluMulBackwardParams)          \
  X(rope_cos_sin, RopeCosSinParams)                    \
  X(rope, RopeParams)                                  \
  X(embedding, EmbeddingParams)                        \
  X(embedding_backward, EmbeddingBackwardParams)       \
  X(lm_head_logprob, LmHeadLogprobParams)              \
  X(lm_head_logprob_backward, LmHeadLogprobBackwardParams)

namespace glmx::gpu {

struct Kernels {
#define GLMX_GPU_ENTRY(name, Params) void (*name)(const Params&);
  GLMX_GPU_KERNELS(GLMX_GPU_ENTRY)
#undef GLMX_GPU_ENTRY
  int (*device_count)();                                     // GPUs that this backend can use here; 0 without a driver
  std::string (*device_name)(int index);                     // "NVIDIA H200"
  int (*architecture)(int index);                            // 80, 90: major * 10 + minor; of HIP the digits of gfx942
  const char* (*grouped_gemm_path)(int index, DType dtype);  // which of its kernels runs there: "sm90", "gpu"
};

#define GLMX_GPU_DECLARE(name, Params) void name(const Params& p);
GLMX_GPU_KERNELS(GLMX_GPU_DECLARE)
#undef GLMX_GPU_DECLARE

void install(Backend backend, const Kernels& kernels);
// The table of a backend, or null: it is not in this build.
const Kernels* kernels(Backend backend);

// Runs one kernel, or says by name what is missing.
template <class Params>
void launch(const char* op, void (*Kernels::*kernel)(const Params&), const Params& p) {
  const Kernels* table = kernels(p.device.backend);
  GLMX_CHECK(table != nullptr, op, ": this build of glmx has no ", backend_name(p.device.backend), " backend: glmx env lists what it has");
  GLMX_CHECK(table->*kernel != nullptr, op, ": no kernel on ", backend_name(p.device.backend), " yet: glmx env lists those that there are");
  (table->*kernel)(p);
}

}  // namespace glmx::gpu
