// torch.ops.glmx.layer_norm, layer_norm_backward
#include "torch/bind.h"

namespace glmx::bind {
namespace {

void forward(Tensor y, std::optional<Tensor> mean, std::optional<Tensor> rstd, const Tensor& x, const Tensor& weight, const Tensor& bias,
             double eps) {
  const Call call(x, "x");
  LayerNormParams p{};
  p.device = call.device();
  p.dtype = model_dtype(x, "x");
  p.x = data(x, "x", p.dtype, {kAny, kAny});
  p.T = x.size(0);
  p.H = x.size(1);
  p.weight = data(weight, "weight", p.dtype, {p.H});
  p.bias = data(bias, "bias", p.dtype, {p.H});
  p.y = data(y, "y", p.dtype, {p.T, p.H});
  p.mean = data_or_null<float>(mean, "mean", DType::f32, {p.T});
  p.rstd = data_or_null<float>(rstd, "rstd", DType::f32, {p.T});
  p.eps = static_cast<float>(eps);
  run(layer_norm, p);
}

void backward(Tensor dx, Tensor d_weight, Tensor d_bias, const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& mean,
              const Tensor& rstd, bool accumulate_weight, bool accumulate_bias) {
  const Call call(x, "x");
  LayerNormBackwardParams p{};
  p.device = call.device();
  p.dtype = model_dtype(x, "x");
  p.x = data(x, "x", p.dtype, {kAny, kAny});
  p.T = x.size(0);
  p.H = x.size(1);
  p.dy = data(dy, "dy", p.dtype, {p.T, p.H});
  p.weight = data(weight, "weight", p.dtype, {p.H});
  p.mean = data_as<float>(mean, "mean", DType::f32, {p.T});
  p.rstd = data_as<float>(rstd, "rstd", DType::f32, {p.T});
  p.dx = data(dx, "dx", p.dtype, {p.T, p.H});
  p.d_weight = data_as<float>(d_weight, "d_weight", DType::f32, {p.H});
  p.d_bias = data_as<float>(d_bias, "d_bias", DType::f32, {p.H});
  const Tensor partial = workspace(x, DType::f32, (p.T + 63) / 64 * 2 * p.H);
  p.partial = static_cast<float*>(partial.data_ptr());
  p.accumulate_weight = accumulate_weight;
  p.accumulate_bias = accumulate_bias;
  layer_norm_backward(p);
}

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY_FRAGMENT(glmx, m) {
  m.def("layer_norm(Tensor(a!) y, Tensor(b!)? mean, Tensor(c!)? rstd, Tensor x, Tensor weight, Tensor bias, float eps) -> ()");
  m.def(
      "layer_norm_backward(Tensor(a!) dx, Tensor(b!) d_weight, Tensor(c!) d_bias, Tensor dy, Tensor x, Tensor weight, Tensor mean, "
      "Tensor rstd, bool accumulate_weight, bool accumulate_bias) -> ()");
}
GLMX_KERNELS(m) {
  m.impl("layer_norm", TORCH_BOX(&glmx::bind::forward));
  m.impl("layer_norm_backward", TORCH_BOX(&glmx::bind::backward));
}
