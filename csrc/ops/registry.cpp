// The table of ops, in the order of ops.h.
#include "ops/registry.h"

#include <cstring>

#include "gpu/kernels.h"

namespace glmx {
namespace {
// Of the GPUs first: a process that has loaded the CPU that plays GPU tests that one, and has no card.
const gpu::Kernels* gpu_table() {
  for (Backend backend : {Backend::cuda, Backend::hip, Backend::simt}) {
    if (const gpu::Kernels* table = gpu::kernels(backend)) return table;
  }
  return nullptr;
}

bool has_kernel(const gpu::Kernels& table, const char* op) {
#define GLMX_GPU_HAS(name, Params) \
  if (std::strcmp(op, #name) == 0) return table.name != nullptr;
  GLMX_GPU_KERNELS(GLMX_GPU_HAS)
#undef GLMX_GPU_HAS
  return false;
}
}  // namespace

Isa chosen_isa(const OpInfo& info, Isa level) {
  for (Isa isa : info.kernels) {
    if (runs_under(isa, level)) return isa;
  }
  return Isa::base;
}

const char* gpu_kernel(const OpInfo& info) {
  const gpu::Kernels* table = gpu_table();
  if (table == nullptr) return "none";
  const std::string op = info.op;
  if (op == "moe_mlp") return table->expert_plan && table->grouped_gemm && table->moe_combine ? "composed" : "none";
  if (!has_kernel(*table, info.op)) return "none";
  if (op != "grouped_gemm" || table->grouped_gemm_path == nullptr || table->device_count() == 0) return "gpu";
  return table->grouped_gemm_path(0, info.variant == std::string("bf16") ? DType::bf16 : DType::f32);
}

const std::vector<OpInfo>& op_table() {
  // clang-format off: one op per line
  static const std::vector<OpInfo> table = {
      route_topk_info(),
      expert_plan_info(),
      grouped_gemm_info(DType::bf16),
      grouped_gemm_info(DType::f32),
      head_gemm_info(DType::bf16),
      head_gemm_info(DType::f32),
      moe_combine_info(),
      moe_mlp_info(DType::bf16),
      moe_mlp_info(DType::f32),
      attention_info(DType::bf16),
      attention_info(DType::f32),
      indexer_topk_info(DType::bf16),
      indexer_topk_info(DType::f32),
      sparse_mla_info(DType::bf16),
      sparse_mla_info(DType::f32),
      indexer_kl_info(DType::bf16),
      indexer_kl_info(DType::f32),
      sample_info(),
      mtp_verify_info(),
      rms_norm_info(),
      add_rms_norm_info(),
      layer_norm_info(),
      silu_mul_info(),
      rope_info(),
      embedding_info(),
      cache_append_info(),
      lm_head_logprob_info(),
      sum_squares_info(),
      adamw_info(),
  };
  // clang-format on
  return table;
}

}  // namespace glmx
