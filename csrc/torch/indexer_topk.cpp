// torch.ops.glmx.indexer_topk
#include "torch/bind.h"

namespace glmx::bind {
namespace {

void forward(Tensor topk_indices, const Tensor& q, const Tensor& weights, const Tensor& k, const Tensor& cu_seqlens_q,
             const Tensor& seq_lens, std::optional<Tensor> cu_seqlens_k, std::optional<Tensor> block_table) {
  IndexerTopkParams p{};
  p.dtype = model_dtype(q, "q");
  p.q = data(q, "q", p.dtype, {kAny, kAny, kAny});
  const int64_t T = q.size(0);
  p.Hi = q.size(1);
  p.Di = q.size(2);
  p.weights = data_as<float>(weights, "weights", DType::f32, {T, p.Hi});
  p.k = data(k, "k", p.dtype, {kAny, p.Di});
  p.topk_indices = data_as<int32_t>(topk_indices, "topk_indices", DType::i32, {T, kAny});
  p.top_k = topk_indices.size(1);
  p.sequences = sequences(cu_seqlens_q, seq_lens, cu_seqlens_k, block_table, T, k.size(0));
  run(indexer_topk, p);
}

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY_FRAGMENT(glmx, m) {
  m.def(
      "indexer_topk(Tensor(a!) topk_indices, Tensor q, Tensor weights, Tensor k, Tensor cu_seqlens_q, Tensor seq_lens, "
      "Tensor? cu_seqlens_k, Tensor? block_table) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(glmx, CPU, m) { m.impl("indexer_topk", TORCH_BOX(&glmx::bind::forward)); }
