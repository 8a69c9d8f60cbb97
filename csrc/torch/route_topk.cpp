// torch.ops.glmx.route_topk, route_topk_backward
#include "torch/bind.h"

namespace glmx::bind {
namespace {

void forward(Tensor topk_weights, Tensor topk_ids, Tensor expert_counts, std::optional<Tensor> scores, const Tensor& logits,
             const Tensor& bias, int64_t n_group, int64_t topk_group, bool norm_topk_prob, double routed_scaling_factor) {
  const Call call(logits, "logits");
  RouteTopkParams p{};
  p.device = call.device();
  p.logits = data_as<float>(logits, "logits", DType::f32, {kAny, kAny});
  p.T = logits.size(0);
  p.E = logits.size(1);
  p.bias = data_as<float>(bias, "bias", DType::f32, {p.E});
  p.topk_weights = data_as<float>(topk_weights, "topk_weights", DType::f32, {p.T, kAny});
  p.K = topk_weights.size(1);
  p.topk_ids = data_as<int32_t>(topk_ids, "topk_ids", DType::i32, {p.T, p.K});
  p.expert_counts = data_as<int32_t>(expert_counts, "expert_counts", DType::i32, {p.E});
  p.scores = data_or_null<float>(scores, "scores", DType::f32, {p.T, p.E});
  p.n_group = n_group;
  p.topk_group = topk_group;
  p.norm_topk_prob = norm_topk_prob;
  p.routed_scaling_factor = static_cast<float>(routed_scaling_factor);
  run(route_topk, p);
}

void backward(Tensor d_logits, std::optional<Tensor> d_topk_weights, std::optional<Tensor> d_scores, const Tensor& logits,
              const Tensor& topk_ids, bool norm_topk_prob, double routed_scaling_factor) {
  const Call call(logits, "logits");
  RouteTopkBackwardParams p{};
  p.device = call.device();
  p.logits = data_as<float>(logits, "logits", DType::f32, {kAny, kAny});
  p.T = logits.size(0);
  p.E = logits.size(1);
  p.topk_ids = data_as<int32_t>(topk_ids, "topk_ids", DType::i32, {p.T, kAny});
  p.K = topk_ids.size(1);
  p.d_topk_weights = data_or_null<float>(d_topk_weights, "d_topk_weights", DType::f32, {p.T, p.K});
  p.d_scores = data_or_null<float>(d_scores, "d_scores", DType::f32, {p.T, p.E});
  p.d_logits = data_as<float>(d_logits, "d_logits", DType::f32, {p.T, p.E});
  p.norm_topk_prob = norm_topk_prob;
  p.routed_scaling_factor = static_cast<float>(routed_scaling_factor);
  route_topk_backward(p);
}

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY_FRAGMENT(glmx, m) {
  m.def(
      "route_topk(Tensor(a!) topk_weights, Tensor(b!) topk_ids, Tensor(c!) expert_counts, Tensor(d!)? scores, Tensor logits, Tensor bias, "
      "int n_group, int topk_group, bool norm_topk_prob, float routed_scaling_factor) -> ()");
  m.def(
      "route_topk_backward(Tensor(a!) d_logits, Tensor? d_topk_weights, Tensor? d_scores, Tensor logits, Tensor topk_ids, "
      "bool norm_topk_prob, float routed_scaling_factor) -> ()");
}
GLMX_KERNELS(m) {
  m.impl("route_topk", TORCH_BOX(&glmx::bind::forward));
  m.impl("route_topk_backward", TORCH_BOX(&glmx::bind::backward));
}
