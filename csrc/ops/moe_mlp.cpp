// moe_mlp: checks, then the ops that it is made of, one after the other.
#include "core/check.h"
#include "glmx/ops.h"
#include "ops/registry.h"

namespace glmx {

// Its time is that of its two products, so their kernel is the one that it is said to run.
OpInfo moe_mlp_info(DType operands) {
  OpInfo info = grouped_gemm_info(operands);
  info.op = "moe_mlp";
  info.revision = kMoeMlpRevision;
  return info;
}

void moe_mlp(const MoeMlpParams& p) {
  GLMX_CHECK(p.E >= 1, "moe_mlp: expected at least one expert: got gate_up_proj.shape[0] == ", p.E);
  GLMX_CHECK(p.H >= 1 && p.I >= 1, "moe_mlp: expected H >= 1 and I >= 1: got down_proj.shape[1:] == [", p.H, ", ", p.I, "]");
  GLMX_CHECK(p.K >= 1, "moe_mlp: expected topk_ids.shape[1] >= 1: got ", p.K);

  GLMX_CHECK((p.gate_up_stored.table == nullptr) == (p.down_stored.table == nullptr),
             "moe_mlp: expected both gate_up_proj and down_proj to be stored, or none");
  GLMX_CHECK(p.down_stored.table == nullptr || host_reads(p.device), "moe_mlp: stored weights run on the CPU: got x on ",
             backend_name(p.device.backend));

  const int64_t R = p.T * p.K;
  ExpertPlanParams plan{};
  plan.topk_ids = p.topk_ids;
  plan.expert_offsets = p.plan;
  plan.row_token = p.plan + p.E + 1;
  plan.inverse = plan.row_token + R;
  plan.T = p.T;
  plan.K = p.K;
  plan.E = p.E;
  plan.device = p.device;
  expert_plan(plan);

  GroupedGemmParams up{};
  up.x = p.x;
  up.w = p.gate_up_proj;
  up.stored = p.gate_up_stored;
  up.expert_offsets = plan.expert_offsets;
  up.row_token = plan.row_token;
  up.out = p.h;
  up.M = p.T;
  up.R = R;
  up.N = 2 * p.I;
  up.K = p.H;
  up.E = p.E;
  up.dtype = up.out_dtype = p.dtype;
  up.silu_mul = true;
  up.device = p.device;
  grouped_gemm(up);

  GroupedGemmParams down{};
  down.x = p.h;
  down.w = p.down_proj;
  down.stored = p.down_stored;
  down.expert_offsets = plan.expert_offsets;
  down.out = p.rows;
  down.M = down.R = R;
  down.N = p.H;
  down.K = p.I;
  down.E = p.E;
  down.dtype = down.out_dtype = p.dtype;
  down.device = p.device;
  grouped_gemm(down);

  moe_combine({p.rows, p.topk_weights, plan.inverse, p.out, p.T, p.K, R, p.H, p.dtype, p.device});
}

}  // namespace glmx
