// torch.ops.glmx.sum_squares
#include "torch/bind.h"

namespace glmx::bind {
namespace {

void forward(Tensor out, const Tensor& x) {
  SumSquaresParams p{};
  p.dtype = model_dtype(x, "x");
  p.x = data(x, "x", p.dtype, {kAny});
  p.n = x.size(0);
  p.out = data_as<double>(out, "out", DType::f64, {1});
  const Tensor partial = workspace(x, DType::f64, (p.n + kSumSquaresChunk - 1) / kSumSquaresChunk);
  p.partial = static_cast<double*>(partial.data_ptr());
  sum_squares(p);
}

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY_FRAGMENT(glmx, m) { m.def("sum_squares(Tensor(a!) out, Tensor x) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(glmx, CPU, m) { m.impl("sum_squares", TORCH_BOX(&glmx::bind::forward)); }
