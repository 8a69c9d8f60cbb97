// torch.ops.glmx.moe_combine, moe_combine_backward
#include "torch/bind.h"

namespace glmx::bind {
namespace {

void forward(Tensor out, const Tensor& rows, std::optional<Tensor> topk_weights, const Tensor& inverse) {
  const Call call(rows, "rows");
  MoeCombineParams p{};
  p.device = call.device();
  p.dtype = model_dtype(rows, "rows");
  p.rows = data(rows, "rows", p.dtype, {kAny, kAny});
  p.R = rows.size(0);
  p.H = rows.size(1);
  p.inverse = data_as<int32_t>(inverse, "inverse", DType::i32, {kAny, kAny});
  p.T = inverse.size(0);
  p.K = inverse.size(1);
  p.topk_weights = data_or_null<float>(topk_weights, "topk_weights", DType::f32, {p.T, p.K});
  p.out = data(out, "out", p.dtype, {p.T, p.H});
  run(moe_combine, p);
}

void backward(Tensor d_rows, std::optional<Tensor> d_topk_weights, const Tensor& d_out, const Tensor& rows,
              std::optional<Tensor> topk_weights, const Tensor& inverse) {
  const Call call(rows, "rows");
  MoeCombineBackwardParams p{};
  p.device = call.device();
  p.dtype = model_dtype(rows, "rows");
  p.rows = data(rows, "rows", p.dtype, {kAny, kAny});
  p.R = rows.size(0);
  p.H = rows.size(1);
  p.inverse = data_as<int32_t>(inverse, "inverse", DType::i32, {kAny, kAny});
  p.T = inverse.size(0);
  p.K = inverse.size(1);
  p.topk_weights = data_or_null<float>(topk_weights, "topk_weights", DType::f32, {p.T, p.K});
  p.d_out = data(d_out, "d_out", p.dtype, {p.T, p.H});
  p.d_rows = data(d_rows, "d_rows", p.dtype, {p.R, p.H});
  p.d_topk_weights = data_or_null<float>(d_topk_weights, "d_topk_weights", DType::f32, {p.T, p.K});
  const Tensor pair_of_row = workspace(rows, DType::i32, p.R);
  p.pair_of_row = static_cast<int32_t*>(pair_of_row.data_ptr());
  moe_combine_backward(p);
}

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY_FRAGMENT(glmx, m) {
  m.def("moe_combine(Tensor(a!) out, Tensor rows, Tensor? topk_weights, Tensor inverse) -> ()");
  m.def(
      "moe_combine_backward(Tensor(a!) d_rows, Tensor(b!)? d_topk_weights, Tensor d_out, Tensor rows, Tensor? topk_weights, Tensor "
      "inverse) "
      "-> ()");
}
GLMX_KERNELS(m) {
  m.impl("moe_combine", TORCH_BOX(&glmx::bind::forward));
  m.impl("moe_combine_backward", TORCH_BOX(&glmx::bind::backward));
}
