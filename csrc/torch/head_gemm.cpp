// torch.ops.glmx.head_gemm, head_gemm_wgrad
#include "torch/bind.h"

namespace glmx::bind {
namespace {

void check_size(const Tensor& t, const char* name, int64_t dim, int64_t want) {
  GLMX_CHECK(t.size(dim) == want, name, ": expected size ", want, " in dimension ", dim, ": got shape ", shape_of(t));
}

void forward(Tensor y, const Tensor& x, const Tensor& w, bool transposed) {
  HeadGemmParams p{};
  p.dtype = model_dtype(x, "x");
  p.out_dtype = model_dtype(y, "y");
  p.transposed = transposed;
  p.x = view_data(x, "x", p.dtype, 3);
  p.w = view_data(w, "w", p.dtype, 3);
  p.y = view_data(y, "y", p.out_dtype, 3);
  p.T = x.size(0), p.A = x.size(1), p.K = x.size(2), p.N = w.size(transposed ? 2 : 1);
  check_size(w, "w", 0, p.A);
  check_size(w, "w", transposed ? 1 : 2, p.K);
  check_size(y, "y", 0, p.T);
  check_size(y, "y", 1, p.A);
  check_size(y, "y", 2, p.N);
  p.x_token = x.stride(0), p.x_head = x.stride(1);
  p.w_head = w.stride(0), p.w_row = w.stride(1);
  p.y_token = y.stride(0), p.y_head = y.stride(1);
  run(head_gemm, p);
}

void wgrad(Tensor dw, const Tensor& dy, const Tensor& x, bool accumulate) {
  HeadGemmWgradParams p{};
  p.dtype = model_dtype(x, "x");
  p.out_dtype = model_dtype(dw, "dw");
  p.accumulate = accumulate;
  p.dy = view_data(dy, "dy", p.dtype, 3);
  p.x = view_data(x, "x", p.dtype, 3);
  p.dw = view_data(dw, "dw", p.out_dtype, 3);
  p.T = x.size(0), p.A = x.size(1), p.K = x.size(2), p.N = dy.size(2);
  check_size(dy, "dy", 0, p.T);
  check_size(dy, "dy", 1, p.A);
  check_size(dw, "dw", 0, p.A);
  check_size(dw, "dw", 1, p.N);
  check_size(dw, "dw", 2, p.K);
  p.dy_token = dy.stride(0), p.dy_head = dy.stride(1);
  p.x_token = x.stride(0), p.x_head = x.stride(1);
  p.dw_head = dw.stride(0), p.dw_row = dw.stride(1);
  head_gemm_wgrad(p);
}

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY_FRAGMENT(glmx, m) {
  m.def("head_gemm(Tensor(a!) y, Tensor x, Tensor w, bool transposed) -> ()");
  m.def("head_gemm_wgrad(Tensor(a!) dw, Tensor dy, Tensor x, bool accumulate) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(glmx, CPU, m) {
  m.impl("head_gemm", TORCH_BOX(&glmx::bind::forward));
  m.impl("head_gemm_wgrad", TORCH_BOX(&glmx::bind::wgrad));
}
