// torch.ops.glmx.adamw
#include "torch/bind.h"

namespace glmx::bind {
namespace {

void update(Tensor param, Tensor master, Tensor exp_avg, Tensor exp_avg_sq, Tensor grad, double grad_scale, double beta1, double rest1,
            double beta2, double rest2, double keep, double root, double eps, double rate) {
  AdamwParams p{};
  p.dtype = model_dtype(param, "param");
  p.param = data(param, "param", p.dtype, {kAny});
  p.n = param.size(0);
  p.master = data_as<float>(master, "master", DType::f32, {p.n});
  p.exp_avg = data_as<float>(exp_avg, "exp_avg", DType::f32, {p.n});
  p.exp_avg_sq = data_as<float>(exp_avg_sq, "exp_avg_sq", DType::f32, {p.n});
  p.grad = data_as<float>(grad, "grad", DType::f32, {p.n});
  p.grad_scale = static_cast<float>(grad_scale);
  p.beta1 = static_cast<float>(beta1);
  p.rest1 = static_cast<float>(rest1);
  p.beta2 = static_cast<float>(beta2);
  p.rest2 = static_cast<float>(rest2);
  p.keep = static_cast<float>(keep);
  p.root = static_cast<float>(root);
  p.eps = static_cast<float>(eps);
  p.rate = static_cast<float>(rate);
  adamw(p);
}

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY_FRAGMENT(glmx, m) {
  m.def(
      "adamw(Tensor(a!) param, Tensor(b!) master, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor(e!) grad, float grad_scale, "
      "float beta1, float rest1, float beta2, float rest2, float keep, float root, float eps, float rate) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(glmx, CPU, m) { m.impl("adamw", TORCH_BOX(&glmx::bind::update)); }
