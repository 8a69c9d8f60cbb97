// torch.ops.glmx.rope_cos_sin, rope
#include "torch/bind.h"

namespace glmx::bind {
namespace {

void cos_sin(Tensor cos, Tensor sin, const Tensor& positions, double theta) {
  const Call call(positions, "positions");
  RopeCosSinParams p{};
  p.device = call.device();
  p.positions = data_as<int64_t>(positions, "positions", DType::i64, {kAny});
  p.T = positions.size(0);
  p.cos = data_as<float>(cos, "cos", DType::f32, {p.T, kAny});
  p.half = cos.size(1);
  p.sin = data_as<float>(sin, "sin", DType::f32, {p.T, p.half});
  p.theta = theta;
  run(rope_cos_sin, p);
}

void rotate(Tensor y, const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved, bool inverse) {
  const Call call(x, "x");
  RopeParams p{};
  p.device = call.device();
  p.dtype = model_dtype(x, "x");
  p.x = data(x, "x", p.dtype, {kAny, kAny, kAny});
  p.T = x.size(0);
  p.A = x.size(1);
  p.D = x.size(2);
  p.cos = data_as<float>(cos, "cos", DType::f32, {p.T, kAny});
  p.half = cos.size(1);
  p.sin = data_as<float>(sin, "sin", DType::f32, {p.T, p.half});
  p.y = data(y, "y", p.dtype, {p.T, p.A, p.D});
  p.interleaved = interleaved;
  p.inverse = inverse;
  run(rope, p);
}

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY_FRAGMENT(glmx, m) {
  m.def("rope_cos_sin(Tensor(a!) cos, Tensor(b!) sin, Tensor positions, float theta) -> ()");
  m.def("rope(Tensor(a!) y, Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> ()");
}
GLMX_KERNELS(m) {
  m.impl("rope_cos_sin", TORCH_BOX(&glmx::bind::cos_sin));
  m.impl("rope", TORCH_BOX(&glmx::bind::rotate));
}
