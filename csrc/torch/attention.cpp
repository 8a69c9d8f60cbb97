// torch.ops.glmx.attention, attention_backward
#include "torch/bind.h"

namespace glmx::bind {
namespace {

// What forward and backward have in common: q, k, v and the shapes.
template <class Params>
void inputs(Params& p, const Tensor& q, const Tensor& k, const std::optional<Tensor>& v, const Tensor& out, double scale) {
  p.dtype = model_dtype(q, "q");
  p.q = data(q, "q", p.dtype, {kAny, kAny, kAny});
  p.A = q.size(1);
  p.Dk = q.size(2);
  p.k = data(k, "k", p.dtype, {kAny, kAny, p.Dk});
  p.G = k.size(1);
  p.Dv = out.dim() == 3 ? out.size(2) : 0;
  GLMX_CHECK(v.has_value() || p.G == 1, "v: expected values, or k.shape[1] == 1: got none with ", p.G, " kv heads");
  p.v = v.has_value() ? data(*v, "v", p.dtype, {k.size(0), p.G, p.Dv}) : nullptr;
  p.scale = static_cast<float>(scale);
}

void forward(Tensor out, std::optional<Tensor> lse, const Tensor& q, const Tensor& k, std::optional<Tensor> v, const Tensor& cu_seqlens_q,
             const Tensor& seq_lens, std::optional<Tensor> cu_seqlens_k, std::optional<Tensor> block_table, double scale) {
  AttentionParams p{};
  inputs(p, q, k, v, out, scale);
  const int64_t T = q.size(0);
  p.out = data(out, "out", p.dtype, {T, p.A, kAny});
  p.lse = data_or_null<float>(lse, "lse", DType::f32, {T, p.A});
  p.sequences = sequences(cu_seqlens_q, seq_lens, cu_seqlens_k, block_table, T, k.size(0));
  run(attention, p);
}

void backward(Tensor d_q, Tensor d_k, std::optional<Tensor> d_v, const Tensor& d_out, const Tensor& q, const Tensor& k,
              std::optional<Tensor> v, const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& seq_lens,
              const Tensor& cu_seqlens_k, double scale) {
  AttentionBackwardParams p{};
  inputs(p, q, k, v, out, scale);
  const int64_t T = q.size(0);
  p.out = data(out, "out", p.dtype, {T, p.A, kAny});
  p.d_out = data(d_out, "d_out", p.dtype, {T, p.A, p.Dv});
  p.lse = data_as<float>(lse, "lse", DType::f32, {T, p.A});
  p.d_q = data(d_q, "d_q", p.dtype, {T, p.A, p.Dk});
  p.d_k = data(d_k, "d_k", p.dtype, {k.size(0), p.G, p.Dk});
  GLMX_CHECK(d_v.has_value() == v.has_value(), "d_v: expected one with v and none without");
  p.d_v = d_v.has_value() ? data(*d_v, "d_v", p.dtype, {k.size(0), p.G, p.Dv}) : nullptr;
  p.sequences = sequences(cu_seqlens_q, seq_lens, cu_seqlens_k, std::nullopt, T, k.size(0));
  const Tensor delta = workspace(q, DType::f32, T * p.A);
  p.delta = static_cast<float*>(delta.data_ptr());
  attention_backward(p);
}

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY_FRAGMENT(glmx, m) {
  m.def(
      "attention(Tensor(a!) out, Tensor(b!)? lse, Tensor q, Tensor k, Tensor? v, Tensor cu_seqlens_q, Tensor seq_lens, "
      "Tensor? cu_seqlens_k, Tensor? block_table, float scale) -> ()");
  m.def(
      "attention_backward(Tensor(a!) d_q, Tensor(b!) d_k, Tensor(c!)? d_v, Tensor d_out, Tensor q, Tensor k, Tensor? v, Tensor out, "
      "Tensor lse, Tensor cu_seqlens_q, Tensor seq_lens, Tensor cu_seqlens_k, float scale) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(glmx, CPU, m) {
  m.impl("attention", TORCH_BOX(&glmx::bind::forward));
  m.impl("attention_backward", TORCH_BOX(&glmx::bind::backward));
}
