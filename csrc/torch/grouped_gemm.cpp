// torch.ops.glmx.grouped_gemm, grouped_gemm_stored
#include "torch/bind.h"

namespace glmx::bind {
namespace {

// Everything but the weights and the bias; N is the weights'.
GroupedGemmParams params(const Call& call, const Tensor& out, const Tensor& x, const std::optional<Tensor>& expert_offsets,
                         const std::optional<Tensor>& row_token, int64_t E, int64_t N, bool silu_mul) {
  GroupedGemmParams p{};
  p.device = call.device();
  p.dtype = model_dtype(x, "x");
  p.out_dtype = model_dtype(out, "out");
  p.silu_mul = silu_mul;
  p.x = data(x, "x", p.dtype, {kAny, kAny});
  p.M = p.R = x.size(0);
  p.K = x.size(1);
  if (row_token.has_value()) {
    p.row_token = data_as<int32_t>(*row_token, "row_token", DType::i32, {kAny});
    p.R = row_token->size(0);
  }
  p.E = E, p.N = N;
  p.expert_offsets = data_or_null<int32_t>(expert_offsets, "expert_offsets", DType::i32, {E + 1});
  p.out = data(out, "out", p.out_dtype, {p.R, silu_mul ? N / 2 : N});
  return p;
}

// Without offsets all rows belong to one expert: w is [N, K], bias [N].
void forward(Tensor out, std::optional<Tensor> preact, const Tensor& x, const Tensor& w, std::optional<Tensor> expert_offsets,
             std::optional<Tensor> row_token, std::optional<Tensor> bias, bool silu_mul) {
  const bool grouped = expert_offsets.has_value();
  GLMX_CHECK(w.dim() == (grouped ? 3 : 2), "w: expected ", grouped ? 3 : 2, " dimensions: got shape ", shape_of(w));
  const Call call(x, "x");
  GroupedGemmParams p = params(call, out, x, expert_offsets, row_token, grouped ? w.size(0) : 1, w.size(grouped ? 1 : 0), silu_mul);
  p.w = grouped ? data(w, "w", p.dtype, {p.E, p.N, p.K}) : data(w, "w", p.dtype, {p.N, p.K});
  p.bias = grouped ? data_or_null<void>(bias, "bias", p.dtype, {p.E, p.N}) : data_or_null<void>(bias, "bias", p.dtype, {p.N});
  p.preact = data_or_null<void>(preact, "preact", p.dtype, {p.R, p.N});
  run(grouped_gemm, p);
}

// The table of a StoredWeight [E, N, K] in the place of w; bias [E, N].
void forward_stored(Tensor out, const Tensor& x, const Tensor& table, int64_t format, int64_t scale_dtype, int64_t N,
                    std::optional<Tensor> expert_offsets, std::optional<Tensor> row_token, std::optional<Tensor> bias, bool silu_mul) {
  const int64_t E = expert_offsets.has_value() ? expert_offsets->numel() - 1 : 1;
  const Call call(x, "x");
  GroupedGemmParams p = params(call, out, x, expert_offsets, row_token, E, N, silu_mul);
  p.stored = stored_weights(table, "w", format, scale_dtype, E, silu_mul ? 2 : 1);
  p.bias = data_or_null<void>(bias, "bias", p.dtype, {E, N});
  run(grouped_gemm, p);
}

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY_FRAGMENT(glmx, m) {
  m.def(
      "grouped_gemm(Tensor(a!) out, Tensor(b!)? preact, Tensor x, Tensor w, Tensor? expert_offsets, Tensor? row_token, Tensor? bias, "
      "bool silu_mul) -> ()");
  m.def(
      "grouped_gemm_stored(Tensor(a!) out, Tensor x, Tensor table, int format, int scale_dtype, int N, Tensor? expert_offsets, "
      "Tensor? row_token, Tensor? bias, bool silu_mul) -> ()");
}
GLMX_KERNELS(m) { m.impl("grouped_gemm", TORCH_BOX(&glmx::bind::forward)); }
STABLE_TORCH_LIBRARY_IMPL(glmx, CPU, m) { m.impl("grouped_gemm_stored", TORCH_BOX(&glmx::bind::forward_stored)); }
