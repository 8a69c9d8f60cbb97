// torch.ops.glmx.sparse_mla, sparse_mla_backward
#include "torch/bind.h"

namespace glmx::bind {
namespace {

// What forward and backward have in common: q, kv, the lists and the shapes.
template <class Params>
void inputs(Params& p, const Tensor& q, const Tensor& kv, const Tensor& topk_indices, const Tensor& out, double scale) {
  p.dtype = model_dtype(q, "q");
  p.q = data(q, "q", p.dtype, {kAny, kAny, kAny});
  p.A = q.size(1);
  p.Dk = q.size(2);
  p.kv = data(kv, "kv", p.dtype, {kAny, p.Dk});
  p.topk_indices = data_as<int32_t>(topk_indices, "topk_indices", DType::i32, {q.size(0), kAny});
  p.top_k = topk_indices.size(1);
  p.Dv = out.dim() == 3 ? out.size(2) : 0;
  p.scale = static_cast<float>(scale);
}

void forward(Tensor out, std::optional<Tensor> lse, const Tensor& q, const Tensor& kv, const Tensor& topk_indices,
             const Tensor& cu_seqlens_q, const Tensor& seq_lens, std::optional<Tensor> cu_seqlens_k, std::optional<Tensor> block_table,
             double scale) {
  SparseMlaParams p{};
  inputs(p, q, kv, topk_indices, out, scale);
  p.out = data(out, "out", p.dtype, {q.size(0), p.A, kAny});
  p.lse = data_or_null<float>(lse, "lse", DType::f32, {q.size(0), p.A});
  p.sequences = sequences(cu_seqlens_q, seq_lens, cu_seqlens_k, block_table, q.size(0), kv.size(0));
  run(sparse_mla, p);
}

void backward(Tensor d_q, Tensor d_kv, const Tensor& d_out, const Tensor& q, const Tensor& kv, const Tensor& topk_indices,
              const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& seq_lens, const Tensor& cu_seqlens_k,
              double scale) {
  SparseMlaBackwardParams p{};
  inputs(p, q, kv, topk_indices, out, scale);
  const int64_t T = q.size(0), rows = kv.size(0);
  p.out = data(out, "out", p.dtype, {T, p.A, kAny});
  p.d_out = data(d_out, "d_out", p.dtype, {T, p.A, p.Dv});
  p.lse = data_as<float>(lse, "lse", DType::f32, {T, p.A});
  p.d_q = data(d_q, "d_q", p.dtype, {T, p.A, p.Dk});
  p.d_kv = data(d_kv, "d_kv", p.dtype, {rows, p.Dk});
  p.sequences = sequences(cu_seqlens_q, seq_lens, cu_seqlens_k, std::nullopt, T, rows);
  p.score_tokens = sparse_mla_score_tokens(p);
  const int64_t blocks = (p.top_k + kBlockKeys - 1) / kBlockKeys;
  const Tensor delta = workspace(q, DType::f32, T * p.A), sums = workspace(q, DType::f32, rows * p.Dk);
  const Tensor scores = workspace(q, DType::f32, 2 * p.score_tokens * blocks * p.A * kBlockKeys);
  p.delta = static_cast<float*>(delta.data_ptr());
  p.sums = static_cast<float*>(sums.data_ptr());
  p.scores = static_cast<float*>(scores.data_ptr());
  sparse_mla_backward(p);
}

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY_FRAGMENT(glmx, m) {
  m.def(
      "sparse_mla(Tensor(a!) out, Tensor(b!)? lse, Tensor q, Tensor kv, Tensor topk_indices, Tensor cu_seqlens_q, Tensor seq_lens, "
      "Tensor? cu_seqlens_k, Tensor? block_table, float scale) -> ()");
  m.def(
      "sparse_mla_backward(Tensor(a!) d_q, Tensor(b!) d_kv, Tensor d_out, Tensor q, Tensor kv, Tensor topk_indices, Tensor out, "
      "Tensor lse, Tensor cu_seqlens_q, Tensor seq_lens, Tensor cu_seqlens_k, float scale) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(glmx, CPU, m) {
  m.impl("sparse_mla", TORCH_BOX(&glmx::bind::forward));
  m.impl("sparse_mla_backward", TORCH_BOX(&glmx::bind::backward));
}
