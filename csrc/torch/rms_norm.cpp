// torch.ops.glmx.rms_norm, rms_norm_backward
#include "torch/bind.h"

namespace glmx::bind {
namespace {

void forward(Tensor y, std::optional<Tensor> rstd, const Tensor& x, const Tensor& weight, double eps) {
  const Call call(x, "x");
  RmsNormParams p{};
  p.device = call.device();
  p.dtype = model_dtype(x, "x");
  p.x = data(x, "x", p.dtype, {kAny, kAny});
  p.T = x.size(0);
  p.H = x.size(1);
  p.weight = data(weight, "weight", p.dtype, {p.H});
  p.y = data(y, "y", p.dtype, {p.T, p.H});
  p.rstd = data_or_null<float>(rstd, "rstd", DType::f32, {p.T});
  p.eps = static_cast<float>(eps);
  run(rms_norm, p);
}

void backward(Tensor dx, Tensor d_weight, const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd, bool accumulate) {
  const Call call(x, "x");
  RmsNormBackwardParams p{};
  p.device = call.device();
  p.dtype = model_dtype(x, "x");
  p.x = data(x, "x", p.dtype, {kAny, kAny});
  p.T = x.size(0);
  p.H = x.size(1);
  p.dy = data(dy, "dy", p.dtype, {p.T, p.H});
  p.weight = data(weight, "weight", p.dtype, {p.H});
  p.rstd = data_as<float>(rstd, "rstd", DType::f32, {p.T});
  p.dx = data(dx, "dx", p.dtype, {p.T, p.H});
  p.d_weight = data_as<float>(d_weight, "d_weight", DType::f32, {p.H});
  const Tensor partial = workspace(x, DType::f32, (p.T + 63) / 64 * p.H);
  p.partial = static_cast<float*>(partial.data_ptr());
  p.accumulate = accumulate;
  rms_norm_backward(p);
}

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY_FRAGMENT(glmx, m) {
  m.def("rms_norm(Tensor(a!) y, Tensor(b!)? rstd, Tensor x, Tensor weight, float eps) -> ()");
  m.def("rms_norm_backward(Tensor(a!) dx, Tensor(b!) d_weight, Tensor dy, Tensor x, Tensor weight, Tensor rstd, bool accumulate) -> ()");
}
GLMX_KERNELS(m) {
  m.impl("rms_norm", TORCH_BOX(&glmx::bind::forward));
  m.impl("rms_norm_backward", TORCH_BOX(&glmx::bind::backward));
}
