// torch.ops.glmx.sample
#include "torch/sample_rules.h"

namespace glmx::bind {
namespace {

void forward(Tensor ids, const Tensor& logits, const Tensor& seeds, const Tensor& positions, const Tensor& temperature, const Tensor& top_k,
             const Tensor& top_p, const Tensor& min_p, std::optional<Tensor> token_ids, std::optional<Tensor> history,
             std::optional<Tensor> repetition_penalty, std::optional<Tensor> presence_penalty, std::optional<Tensor> frequency_penalty,
             std::optional<Tensor> bias_ids, std::optional<Tensor> bias_values, std::optional<Tensor> bias_spans, int64_t draw) {
  SampleParams p{};
  p.logits = data_as<float>(logits, "logits", DType::f32, {kAny, kAny});
  p.R = logits.size(0);
  p.V = logits.size(1);
  p.ids = data_as<int64_t>(ids, "ids", DType::i64, {p.R});
  p.rules = sample_rules(p.R, seeds, positions, temperature, top_k, top_p, min_p, token_ids, history, repetition_penalty, presence_penalty,
                         frequency_penalty, bias_ids, bias_values, bias_spans);
  p.draw = draw;
  run(sample, p);
}

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY_FRAGMENT(glmx, m) {
  m.def(
      "sample(Tensor(a!) ids, Tensor logits, Tensor seeds, Tensor positions, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, "
      "Tensor? token_ids, Tensor? history, Tensor? repetition_penalty, Tensor? presence_penalty, Tensor? frequency_penalty, "
      "Tensor? bias_ids, Tensor? bias_values, Tensor? bias_spans, int draw) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(glmx, CPU, m) { m.impl("sample", TORCH_BOX(&glmx::bind::forward)); }
