// torch.ops.glmx.lm_head_logprob, lm_head_logprob_backward
#include "torch/bind.h"

namespace glmx::bind {
namespace {

void forward(Tensor logprob, Tensor lse, Tensor top_ids, Tensor top_logprobs, const Tensor& hidden, const Tensor& weight, const Tensor& ids,
             double temperature) {
  const Call call(hidden, "hidden");
  LmHeadLogprobParams p{};
  p.device = call.device();
  p.dtype = model_dtype(hidden, "hidden");
  p.hidden = data(hidden, "hidden", p.dtype, {kAny, kAny});
  p.T = hidden.size(0);
  p.H = hidden.size(1);
  p.weight = data(weight, "weight", p.dtype, {kAny, p.H});
  p.V = weight.size(0);
  p.ids = data_as<int64_t>(ids, "ids", DType::i64, {p.T});
  p.logprob = data_as<float>(logprob, "logprob", DType::f32, {p.T});
  p.lse = data_as<float>(lse, "lse", DType::f32, {p.T});
  p.top_ids = data_as<int32_t>(top_ids, "top_ids", DType::i32, {p.T, kAny});
  p.top_n = top_ids.size(1);
  p.top_logprobs = data_as<float>(top_logprobs, "top_logprobs", DType::f32, {p.T, p.top_n});
  p.temperature = static_cast<float>(temperature);
  const Tensor scratch = workspace(hidden, DType::f64, lm_head_logprob_workspace(p) / 8);
  p.workspace = scratch.data_ptr();
  lm_head_logprob(p);
}

void backward(std::optional<Tensor> d_hidden, std::optional<Tensor> d_weight, const Tensor& d_logprob, std::optional<Tensor> d_lse,
              const Tensor& hidden, const Tensor& weight, const Tensor& ids, const Tensor& lse, double temperature, bool accumulate) {
  const Call call(hidden, "hidden");
  LmHeadLogprobBackwardParams p{};
  p.device = call.device();
  p.dtype = model_dtype(hidden, "hidden");
  p.hidden = data(hidden, "hidden", p.dtype, {kAny, kAny});
  p.T = hidden.size(0);
  p.H = hidden.size(1);
  p.weight = data(weight, "weight", p.dtype, {kAny, p.H});
  p.V = weight.size(0);
  p.ids = data_as<int64_t>(ids, "ids", DType::i64, {p.T});
  p.lse = data_as<float>(lse, "lse", DType::f32, {p.T});
  p.d_logprob = data_as<float>(d_logprob, "d_logprob", DType::f32, {p.T});
  p.d_lse = data_or_null<float>(d_lse, "d_lse", DType::f32, {p.T});
  p.d_hidden = data_or_null<float>(d_hidden, "d_hidden", DType::f32, {p.T, p.H});
  p.d_weight = data_or_null<float>(d_weight, "d_weight", DType::f32, {p.V, p.H});
  p.temperature = static_cast<float>(temperature);
  p.accumulate = accumulate;
  const Tensor scratch = workspace(hidden, DType::f64, lm_head_logprob_backward_workspace(p) / 8);
  p.workspace = scratch.data_ptr();
  lm_head_logprob_backward(p);
}

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY_FRAGMENT(glmx, m) {
  m.def(
      "lm_head_logprob(Tensor(a!) logprob, Tensor(b!) lse, Tensor(c!) top_ids, Tensor(d!) top_logprobs, Tensor hidden, Tensor weight, "
      "Tensor ids, float temperature) -> ()");
  m.def(
      "lm_head_logprob_backward(Tensor(a!)? d_hidden, Tensor(b!)? d_weight, Tensor d_logprob, Tensor? d_lse, Tensor hidden, Tensor weight, "
      "Tensor ids, Tensor lse, float temperature, bool accumulate) -> ()");
}
GLMX_KERNELS(m) {
  m.impl("lm_head_logprob", TORCH_BOX(&glmx::bind::forward));
  m.impl("lm_head_logprob_backward", TORCH_BOX(&glmx::bind::backward));
}
