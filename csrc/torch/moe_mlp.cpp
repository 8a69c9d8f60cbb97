// torch.ops.glmx.moe_mlp
#include "torch/bind.h"

namespace glmx::bind {
namespace {

// The workspaces are arguments, so that a recorder knows where they lie and lends them to layer after layer.
void forward(Tensor out, Tensor plan, Tensor h, Tensor rows, const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids,
             const Tensor& gate_up_proj, const Tensor& down_proj) {
  MoeMlpParams p{};
  p.dtype = model_dtype(x, "x");
  p.x = data(x, "x", p.dtype, {kAny, kAny});
  p.T = x.size(0);
  p.H = x.size(1);
  p.topk_ids = data_as<int32_t>(topk_ids, "topk_ids", DType::i32, {p.T, kAny});
  p.K = topk_ids.size(1);
  p.topk_weights = data_as<float>(topk_weights, "topk_weights", DType::f32, {p.T, p.K});
  p.down_proj = data(down_proj, "down_proj", p.dtype, {kAny, p.H, kAny});
  p.E = down_proj.size(0);
  p.I = down_proj.size(2);
  p.gate_up_proj = data(gate_up_proj, "gate_up_proj", p.dtype, {p.E, 2 * p.I, p.H});
  p.out = data(out, "out", p.dtype, {p.T, p.H});
  p.plan = data_as<int32_t>(plan, "plan", DType::i32, {p.E + 1 + 2 * p.T * p.K});
  p.h = data(h, "h", p.dtype, {p.T * p.K, p.I});
  p.rows = data(rows, "rows", p.dtype, {p.T * p.K, p.H});
  run(moe_mlp, p);
}

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY_FRAGMENT(glmx, m) {
  m.def(
      "moe_mlp(Tensor(a!) out, Tensor(b!) plan, Tensor(c!) h, Tensor(d!) rows, Tensor x, Tensor topk_weights, Tensor topk_ids, "
      "Tensor gate_up_proj, Tensor down_proj) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(glmx, CPU, m) { m.impl("moe_mlp", TORCH_BOX(&glmx::bind::forward)); }
