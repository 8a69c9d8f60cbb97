// torch.ops.glmx.indexer_kl, indexer_kl_backward
#include "torch/bind.h"

namespace glmx::bind {
namespace {

// What forward and backward have in common.
template <class Params>
void inputs(Params& p, const Tensor& index_q, const Tensor& index_weights, const Tensor& index_k, const Tensor& q, const Tensor& kv,
            const Tensor& lse, const std::optional<Tensor>& topk_indices, const Tensor& cu_seqlens_q, const Tensor& seq_lens,
            const Tensor& cu_seqlens_k, double scale) {
  p.dtype = model_dtype(index_q, "index_q");
  p.index_q = data(index_q, "index_q", p.dtype, {kAny, kAny, kAny});
  const int64_t T = index_q.size(0);
  p.Hi = index_q.size(1);
  p.Di = index_q.size(2);
  p.index_weights = data_as<float>(index_weights, "index_weights", DType::f32, {T, p.Hi});
  p.index_k = data(index_k, "index_k", p.dtype, {kAny, p.Di});
  p.q = data(q, "q", p.dtype, {T, kAny, kAny});
  p.A = q.size(1);
  p.Dk = q.size(2);
  p.kv = data(kv, "kv", p.dtype, {index_k.size(0), p.Dk});
  p.lse = data_as<float>(lse, "lse", DType::f32, {T, p.A});
  p.topk_indices = data_or_null<int32_t>(topk_indices, "topk_indices", DType::i32, {T, kAny});
  p.top_k = topk_indices.has_value() ? topk_indices->size(1) : 0;
  static constexpr int32_t kNoKey = -1;  // empty lists have no data, and are lists all the same
  if (topk_indices.has_value() && p.topk_indices == nullptr) p.topk_indices = &kNoKey;
  p.sequences = sequences(cu_seqlens_q, seq_lens, cu_seqlens_k, std::nullopt, T, index_k.size(0));
  p.scale = static_cast<float>(scale);
}

void forward(Tensor kl, std::optional<Tensor> index_lse, std::optional<Tensor> mass, const Tensor& index_q, const Tensor& index_weights,
             const Tensor& index_k, const Tensor& q, const Tensor& kv, const Tensor& lse, std::optional<Tensor> topk_indices,
             const Tensor& cu_seqlens_q, const Tensor& seq_lens, const Tensor& cu_seqlens_k, double scale) {
  IndexerKlParams p{};
  inputs(p, index_q, index_weights, index_k, q, kv, lse, topk_indices, cu_seqlens_q, seq_lens, cu_seqlens_k, scale);
  p.kl = data_as<float>(kl, "kl", DType::f32, {p.sequences.T});
  p.index_lse = data_or_null<float>(index_lse, "index_lse", DType::f32, {p.sequences.T});
  p.mass = data_or_null<float>(mass, "mass", DType::f32, {p.sequences.T});
  indexer_kl(p);
}

void backward(Tensor d_index_q, Tensor d_index_weights, Tensor d_index_k, const Tensor& d_kl, const Tensor& index_q,
              const Tensor& index_weights, const Tensor& index_k, const Tensor& q, const Tensor& kv, const Tensor& lse,
              std::optional<Tensor> topk_indices, const Tensor& index_lse, const Tensor& mass, const Tensor& cu_seqlens_q,
              const Tensor& seq_lens, const Tensor& cu_seqlens_k, double scale) {
  IndexerKlBackwardParams p{};
  inputs(p, index_q, index_weights, index_k, q, kv, lse, topk_indices, cu_seqlens_q, seq_lens, cu_seqlens_k, scale);
  const int64_t T = p.sequences.T, rows = p.sequences.key_rows;
  p.d_kl = data_as<float>(d_kl, "d_kl", DType::f32, {T});
  p.index_lse = data_as<float>(index_lse, "index_lse", DType::f32, {T});
  p.mass = data_as<float>(mass, "mass", DType::f32, {T});
  p.d_index_q = data(d_index_q, "d_index_q", p.dtype, {T, p.Hi, p.Di});
  p.d_index_weights = data_as<float>(d_index_weights, "d_index_weights", DType::f32, {T, p.Hi});
  p.d_index_k = data(d_index_k, "d_index_k", p.dtype, {rows, p.Di});
  p.score_blocks = indexer_kl_score_blocks(p);
  p.score_tokens = indexer_kl_score_tokens(p);
  const Tensor sums = workspace(q, DType::f32, rows * p.Di);
  const Tensor scores = workspace(q, DType::f32, p.score_tokens * p.score_blocks * p.Hi * kBlockKeys);
  p.sums = static_cast<float*>(sums.data_ptr());
  p.scores = static_cast<float*>(scores.data_ptr());
  indexer_kl_backward(p);
}

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY_FRAGMENT(glmx, m) {
  m.def(
      "indexer_kl(Tensor(a!) kl, Tensor(b!)? index_lse, Tensor(c!)? mass, Tensor index_q, Tensor index_weights, Tensor index_k, Tensor q, "
      "Tensor kv, Tensor lse, Tensor? topk_indices, Tensor cu_seqlens_q, Tensor seq_lens, Tensor cu_seqlens_k, float scale) -> ()");
  m.def(
      "indexer_kl_backward(Tensor(a!) d_index_q, Tensor(b!) d_index_weights, Tensor(c!) d_index_k, Tensor d_kl, Tensor index_q, "
      "Tensor index_weights, Tensor index_k, Tensor q, Tensor kv, Tensor lse, Tensor? topk_indices, Tensor index_lse, Tensor mass, "
      "Tensor cu_seqlens_q, Tensor seq_lens, Tensor cu_seqlens_k, float scale) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(glmx, CPU, m) {
  m.impl("indexer_kl", TORCH_BOX(&glmx::bind::forward));
  m.impl("indexer_kl_backward", TORCH_BOX(&glmx::bind::backward));
}
