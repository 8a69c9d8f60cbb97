// torch.ops.glmx.grouped_gemm_dgrad, grouped_gemm_wgrad, grouped_gemm_bias_grad
#include "torch/bind.h"

namespace glmx::bind {
namespace {

void dgrad(Tensor dx, const Tensor& dy, const Tensor& w, const Tensor& expert_offsets) {
  const Call call(dy, "dy");
  GroupedGemmDgradParams p{};
  p.device = call.device();
  p.dtype = model_dtype(dy, "dy");
  p.out_dtype = model_dtype(dx, "dx");
  p.dy = data(dy, "dy", p.dtype, {kAny, kAny});
  p.R = dy.size(0);
  p.N = dy.size(1);
  p.w = data(w, "w", p.dtype, {kAny, p.N, kAny});
  p.E = w.size(0);
  p.K = w.size(2);
  p.expert_offsets = data_as<int32_t>(expert_offsets, "expert_offsets", DType::i32, {p.E + 1});
  p.dx = data(dx, "dx", p.out_dtype, {p.R, p.K});
  grouped_gemm_dgrad(p);
}

void wgrad(Tensor dw, const Tensor& dy, const Tensor& x, const Tensor& expert_offsets, std::optional<Tensor> row_token, bool accumulate) {
  const Call call(dy, "dy");
  GroupedGemmWgradParams p{};
  p.device = call.device();
  p.dtype = model_dtype(dy, "dy");
  p.out_dtype = model_dtype(dw, "dw");
  p.accumulate = accumulate;
  p.dy = data(dy, "dy", p.dtype, {kAny, kAny});
  p.R = dy.size(0);
  p.N = dy.size(1);
  p.x = data(x, "x", p.dtype, {kAny, kAny});
  p.M = x.size(0);
  p.K = x.size(1);
  p.dw = data(dw, "dw", p.out_dtype, {kAny, p.N, p.K});
  p.E = dw.size(0);
  p.expert_offsets = data_as<int32_t>(expert_offsets, "expert_offsets", DType::i32, {p.E + 1});
  p.row_token = data_or_null<int32_t>(row_token, "row_token", DType::i32, {p.R});
  grouped_gemm_wgrad(p);
}

void bias_grad(Tensor d_bias, const Tensor& dy, const Tensor& expert_offsets, bool accumulate) {
  const Call call(dy, "dy");
  GroupedGemmBiasGradParams p{};
  p.device = call.device();
  p.dtype = model_dtype(dy, "dy");
  p.accumulate = accumulate;
  p.dy = data(dy, "dy", p.dtype, {kAny, kAny});
  p.R = dy.size(0);
  p.N = dy.size(1);
  p.d_bias = data_as<float>(d_bias, "d_bias", DType::f32, {kAny, p.N});
  p.E = d_bias.size(0);
  p.expert_offsets = data_as<int32_t>(expert_offsets, "expert_offsets", DType::i32, {p.E + 1});
  grouped_gemm_bias_grad(p);
}

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY_FRAGMENT(glmx, m) {
  m.def("grouped_gemm_dgrad(Tensor(a!) dx, Tensor dy, Tensor w, Tensor expert_offsets) -> ()");
  m.def("grouped_gemm_wgrad(Tensor(a!) dw, Tensor dy, Tensor x, Tensor expert_offsets, Tensor? row_token, bool accumulate) -> ()");
  m.def("grouped_gemm_bias_grad(Tensor(a!) d_bias, Tensor dy, Tensor expert_offsets, bool accumulate) -> ()");
}
GLMX_KERNELS(m) {
  m.impl("grouped_gemm_dgrad", TORCH_BOX(&glmx::bind::dgrad));
  m.impl("grouped_gemm_wgrad", TORCH_BOX(&glmx::bind::wgrad));
  m.impl("grouped_gemm_bias_grad", TORCH_BOX(&glmx::bind::bias_grad));
}
