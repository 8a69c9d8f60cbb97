// torch.ops.glmx.grouped_gemm, grouped_gemm_dgrad
#include "torch/bind.h"

namespace glmx::bind {
namespace {

void forward(Tensor out, std::optional<Tensor> preact, const Tensor& x, const Tensor& w, std::optional<Tensor> expert_offsets,
             std::optional<Tensor> row_token, std::optional<Tensor> bias, bool silu_mul) {
  GroupedGemmParams p{};
  p.dtype = model_dtype(x, "x");
  p.out_dtype = model_dtype(out, "out");
  p.silu_mul = silu_mul;
  p.x = data(x, "x", p.dtype, {kAny, kAny});
  p.M = x.size(0);
  p.K = x.size(1);
  p.R = p.M;
  if (row_token.has_value()) {
    p.row_token = data_as<int32_t>(*row_token, "row_token", DType::i32, {kAny});
    p.R = row_token->size(0);
  }
  // Without offsets all rows belong to one expert: w is [N, K], bias [N].
  if (expert_offsets.has_value()) {
    p.w = data(w, "w", p.dtype, {kAny, kAny, p.K});
    p.E = w.size(0);
    p.N = w.size(1);
    p.expert_offsets = data_as<int32_t>(*expert_offsets, "expert_offsets", DType::i32, {p.E + 1});
    p.bias = data_or_null<void>(bias, "bias", p.dtype, {p.E, p.N});
  } else {
    p.w = data(w, "w", p.dtype, {kAny, p.K});
    p.E = 1;
    p.N = w.size(0);
    p.bias = data_or_null<void>(bias, "bias", p.dtype, {p.N});
  }
  p.out = data(out, "out", p.out_dtype, {p.R, silu_mul ? p.N / 2 : p.N});
  p.preact = data_or_null<void>(preact, "preact", p.dtype, {p.R, p.N});
  run(grouped_gemm, p);
}

void dgrad(Tensor dx, const Tensor& dy, const Tensor& w, const Tensor& expert_offsets) {
  GroupedGemmDgradParams p{};
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

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY_FRAGMENT(glmx, m) {
  m.def(
      "grouped_gemm(Tensor(a!) out, Tensor(b!)? preact, Tensor x, Tensor w, Tensor? expert_offsets, Tensor? row_token, Tensor? bias, "
      "bool silu_mul) -> ()");
  m.def("grouped_gemm_dgrad(Tensor(a!) dx, Tensor dy, Tensor w, Tensor expert_offsets) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(glmx, CPU, m) {
  m.impl("grouped_gemm", TORCH_BOX(&glmx::bind::forward));
  m.impl("grouped_gemm_dgrad", TORCH_BOX(&glmx::bind::dgrad));
}
