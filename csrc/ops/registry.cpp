// The table of ops, in the order of ops.h.
#include "ops/registry.h"

namespace glmx {

Isa chosen_isa(const OpInfo& info, Isa level) {
  for (Isa isa : info.kernels) {
    if (runs_under(isa, level)) return isa;
  }
  return Isa::base;
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
