// The table of ops, in the order of ops.h.
#include "ops/registry.h"

#include <algorithm>

#include "gpu/kernels.h"

namespace glmx {
namespace {
// Of the CPU that plays GPU first: a process that has loaded it runs that one.
const gpu::Kernels* gpu_table() {
  for (Backend backend : {Backend::simt, Backend::cuda, Backend::hip}) {
    if (const gpu::Kernels* table = gpu::kernels(backend)) return table;
  }
  return nullptr;
}

bool composes_moe_mlp(const gpu::Kernels& table) { return table.expert_plan && table.grouped_gemm && table.moe_combine; }

std::vector<std::string> names(const gpu::Kernels& table) {
  std::vector<std::string> out;
#define GLMX_GPU_NAME(name, Params) \
  if (table.name != nullptr) out.emplace_back(#name);
  GLMX_GPU_KERNELS(GLMX_GPU_NAME)
#undef GLMX_GPU_NAME
  if (composes_moe_mlp(table)) out.emplace_back("moe_mlp");
  return out;
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
  const std::vector<std::string> have = names(*table);
  if (std::find(have.begin(), have.end(), op) == have.end()) return "none";
  if (op == "moe_mlp") return "composed";
  if (op != "grouped_gemm" || table->grouped_gemm_path == nullptr || table->device_count() == 0) return "gpu";
  return table->grouped_gemm_path(0, info.variant == std::string("bf16") ? DType::bf16 : DType::f32);
}

std::vector<std::string> gpu_kernels(Backend backend) {
  const gpu::Kernels* table = gpu::kernels(backend);
  return table == nullptr ? std::vector<std::string>{} : names(*table);
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
