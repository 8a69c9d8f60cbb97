// torch.ops.glmx.add_rms_norm (its backward is rms_norm_backward)
#include "torch/bind.h"

namespace glmx::bind {
namespace {

void forward(Tensor y, Tensor residual_out, std::optional<Tensor> rstd, const Tensor& x, const Tensor& residual, const Tensor& weight,
             double eps) {
  const Call call(x, "x");
  AddRmsNormParams p{};
  p.device = call.device();
  p.dtype = model_dtype(x, "x");
  p.x = data(x, "x", p.dtype, {kAny, kAny});
  p.T = x.size(0);
  p.H = x.size(1);
  p.residual = data(residual, "residual", p.dtype, {p.T, p.H});
  p.weight = data(weight, "weight", p.dtype, {p.H});
  p.y = data(y, "y", p.dtype, {p.T, p.H});
  p.residual_out = data(residual_out, "residual_out", p.dtype, {p.T, p.H});
  p.rstd = data_or_null<float>(rstd, "rstd", DType::f32, {p.T});
  p.eps = static_cast<float>(eps);
  run(add_rms_norm, p);
}

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY_FRAGMENT(glmx, m) {
  m.def("add_rms_norm(Tensor(a!) y, Tensor(b!) residual_out, Tensor(c!)? rstd, Tensor x, Tensor residual, Tensor weight, float eps) -> ()");
}
GLMX_KERNELS(m) { m.impl("add_rms_norm", TORCH_BOX(&glmx::bind::forward)); }
