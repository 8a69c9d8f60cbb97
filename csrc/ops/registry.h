// What each op tells about itself; one line per stem of ops.h.
#pragma once
#include "core/dispatch.h"

namespace glmx {
OpInfo route_topk_info();
OpInfo expert_plan_info();
OpInfo grouped_gemm_info(DType operands);
OpInfo head_gemm_info(DType operands);
OpInfo moe_combine_info();
OpInfo moe_mlp_info(DType operands);
OpInfo attention_info(DType operands);
OpInfo indexer_topk_info(DType operands);
OpInfo sparse_mla_info(DType operands);
OpInfo indexer_kl_info(DType operands);
OpInfo sample_info();
OpInfo mtp_verify_info();
OpInfo rms_norm_info();
OpInfo add_rms_norm_info();
OpInfo layer_norm_info();
OpInfo silu_mul_info();
OpInfo rope_info();
OpInfo embedding_info();
OpInfo cache_append_info();
OpInfo lm_head_logprob_info();
OpInfo sum_squares_info();
OpInfo adamw_info();
}  // namespace glmx
