// torch.ops.glmx.grouped_gemm_stored: grouped_gemm with a table of stored weights [E, N, K] in the place of w
#include "torch/bind.h"

namespace glmx::bind {
namespace {

void forward(Tensor out, const Tensor& x, const Tensor& table, int64_t format, int64_t scale_dtype, int64_t N,
             std::optional<Tensor> expert_offsets, std::optional<Tensor> row_token, std::optional<Tensor> bias, bool silu_mul) {
  GroupedGemmParams p{};
  p.dtype = model_dtype(x, "x");
  p.out_dtype = model_dtype(out, "out");
  p.silu_mul = silu_mul;
  p.x = data(x, "x", p.dtype, {kAny, kAny});
  p.M = x.size(0);
  p.K = x.size(1);
  p.N = N;
  p.R = p.M;
  if (row_token.has_value()) {
    p.row_token = data_as<int32_t>(*row_token, "row_token", DType::i32, {kAny});
    p.R = row_token->size(0);
  }
  p.E = expert_offsets.has_value() ? expert_offsets->numel() - 1 : 1;
  p.expert_offsets = data_or_null<int32_t>(expert_offsets, "expert_offsets", DType::i32, {p.E + 1});
  p.stored = stored_weights(table, "w", format, scale_dtype, p.E, silu_mul ? 2 : 1);
  p.bias = data_or_null<void>(bias, "bias", p.dtype, {p.E, p.N});
  p.out = data(out, "out", p.out_dtype, {p.R, silu_mul ? p.N / 2 : p.N});
  run(grouped_gemm, p);
}

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY_FRAGMENT(glmx, m) {
  m.def(
      "grouped_gemm_stored(Tensor(a!) out, Tensor x, Tensor table, int format, int scale_dtype, int N, Tensor? expert_offsets, "
      "Tensor? row_token, Tensor? bias, bool silu_mul) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(glmx, CPU, m) { m.impl("grouped_gemm_stored", TORCH_BOX(&glmx::bind::forward)); }
