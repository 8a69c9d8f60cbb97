// torch.ops.glmx.silu_mul, silu_mul_backward
#include "torch/bind.h"

namespace glmx::bind {
namespace {

void forward(Tensor y, const Tensor& x) {
  const Call call(x, "x");
  SiluMulParams p{};
  p.device = call.device();
  p.dtype = model_dtype(x, "x");
  p.x = data(x, "x", p.dtype, {kAny, kAny});
  p.T = x.size(0);
  p.I = x.size(1) / 2;
  GLMX_CHECK(x.size(1) % 2 == 0, "x: expected an even number of columns (gate, then up): got shape ", shape_of(x));
  p.y = data(y, "y", p.dtype, {p.T, p.I});
  run(silu_mul, p);
}

void backward(Tensor dx, const Tensor& dy, const Tensor& x) {
  const Call call(x, "x");
  SiluMulBackwardParams p{};
  p.device = call.device();
  p.dtype = model_dtype(x, "x");
  p.dy = data(dy, "dy", p.dtype, {kAny, kAny});
  p.T = dy.size(0);
  p.I = dy.size(1);
  p.x = data(x, "x", p.dtype, {p.T, 2 * p.I});
  p.dx = data(dx, "dx", p.dtype, {p.T, 2 * p.I});
  silu_mul_backward(p);
}

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY_FRAGMENT(glmx, m) {
  m.def("silu_mul(Tensor(a!) y, Tensor x) -> ()");
  m.def("silu_mul_backward(Tensor(a!) dx, Tensor dy, Tensor x) -> ()");
}
GLMX_KERNELS(m) {
  m.impl("silu_mul", TORCH_BOX(&glmx::bind::forward));
  m.impl("silu_mul_backward", TORCH_BOX(&glmx::bind::backward));
}
