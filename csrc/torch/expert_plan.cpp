// torch.ops.glmx.expert_plan
#include "torch/bind.h"

namespace glmx::bind {
namespace {

void plan(Tensor expert_offsets, Tensor row_token, Tensor inverse, const Tensor& topk_ids, int64_t num_experts) {
  const Call call(topk_ids, "topk_ids");
  ExpertPlanParams p{};
  p.device = call.device();
  p.topk_ids = data_as<int32_t>(topk_ids, "topk_ids", DType::i32, {kAny, kAny});
  p.T = topk_ids.size(0);
  p.K = topk_ids.size(1);
  p.E = num_experts;
  p.expert_offsets = data_as<int32_t>(expert_offsets, "expert_offsets", DType::i32, {p.E + 1});
  p.row_token = data_as<int32_t>(row_token, "row_token", DType::i32, {p.T * p.K});
  p.inverse = data_as<int32_t>(inverse, "inverse", DType::i32, {p.T, p.K});
  run(expert_plan, p);
}

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY_FRAGMENT(glmx, m) {
  m.def("expert_plan(Tensor(a!) expert_offsets, Tensor(b!) row_token, Tensor(c!) inverse, Tensor topk_ids, int num_experts) -> ()");
}
GLMX_KERNELS(m) { m.impl("expert_plan", TORCH_BOX(&glmx::bind::plan)); }
