// torch.ops.glmx.moe_mlp, moe_mlp_stored
#include "torch/bind.h"

namespace glmx::bind {
namespace {

// Everything but the weights. The workspaces are arguments, so that a recorder knows where they lie and lends them to layer after layer.
MoeMlpParams params(const Call& call, const Tensor& out, const Tensor& plan, const Tensor& h, const Tensor& rows, const Tensor& x,
                    const Tensor& topk_weights, const Tensor& topk_ids, int64_t E) {
  MoeMlpParams p{};
  p.device = call.device();
  p.dtype = model_dtype(x, "x");
  p.x = data(x, "x", p.dtype, {kAny, kAny});
  p.T = x.size(0);
  p.H = x.size(1);
  p.topk_ids = data_as<int32_t>(topk_ids, "topk_ids", DType::i32, {p.T, kAny});
  p.K = topk_ids.size(1);
  p.topk_weights = data_as<float>(topk_weights, "topk_weights", DType::f32, {p.T, p.K});
  p.E = E;
  p.out = data(out, "out", p.dtype, {p.T, p.H});
  p.plan = data_as<int32_t>(plan, "plan", DType::i32, {p.E + 1 + 2 * p.T * p.K});
  p.h = data(h, "h", p.dtype, {p.T * p.K, kAny});
  p.I = h.size(1);
  p.rows = data(rows, "rows", p.dtype, {p.T * p.K, p.H});
  return p;
}

void forward(Tensor out, Tensor plan, Tensor h, Tensor rows, const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids,
             const Tensor& gate_up_proj, const Tensor& down_proj) {
  const Call call(x, "x");
  MoeMlpParams p = params(call, out, plan, h, rows, x, topk_weights, topk_ids, down_proj.size(0));
  p.down_proj = data(down_proj, "down_proj", p.dtype, {p.E, p.H, p.I});
  p.gate_up_proj = data(gate_up_proj, "gate_up_proj", p.dtype, {p.E, 2 * p.I, p.H});
  run(moe_mlp, p);
}

void forward_stored(Tensor out, Tensor plan, Tensor h, Tensor rows, const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids,
                    const Tensor& gate_up_table, const Tensor& down_table, int64_t format, int64_t scale_dtype) {
  const Call call(x, "x");
  MoeMlpParams p = params(call, out, plan, h, rows, x, topk_weights, topk_ids, down_table.numel() / 2);
  p.gate_up_stored = stored_weights(gate_up_table, "gate_up_proj", format, scale_dtype, p.E, 2);
  p.down_stored = stored_weights(down_table, "down_proj", format, scale_dtype, p.E, 1);
  run(moe_mlp, p);
}

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY_FRAGMENT(glmx, m) {
  m.def(
      "moe_mlp(Tensor(a!) out, Tensor(b!) plan, Tensor(c!) h, Tensor(d!) rows, Tensor x, Tensor topk_weights, Tensor topk_ids, "
      "Tensor gate_up_proj, Tensor down_proj) -> ()");
  m.def(
      "moe_mlp_stored(Tensor(a!) out, Tensor(b!) plan, Tensor(c!) h, Tensor(d!) rows, Tensor x, Tensor topk_weights, Tensor topk_ids, "
      "Tensor gate_up_table, Tensor down_table, int format, int scale_dtype) -> ()");
}
GLMX_KERNELS(m) { m.impl("moe_mlp", TORCH_BOX(&glmx::bind::forward)); }
STABLE_TORCH_LIBRARY_IMPL(glmx, CPU, m) { m.impl("moe_mlp_stored", TORCH_BOX(&glmx::bind::forward_stored)); }
