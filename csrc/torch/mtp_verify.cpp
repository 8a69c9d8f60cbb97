// torch.ops.glmx.mtp_verify
#include "torch/sample_rules.h"

namespace glmx::bind {
namespace {

void forward(Tensor tokens, Tensor accepted, Tensor packed_ids, Tensor packed_offsets, const Tensor& draft_ids, const Tensor& logits,
             std::optional<Tensor> draft_probs, const Tensor& seeds, const Tensor& positions, const Tensor& temperature,
             const Tensor& top_k, const Tensor& top_p, const Tensor& min_p, std::optional<Tensor> token_ids, std::optional<Tensor> history,
             std::optional<Tensor> repetition_penalty, std::optional<Tensor> presence_penalty, std::optional<Tensor> frequency_penalty,
             std::optional<Tensor> bias_ids, std::optional<Tensor> bias_values, std::optional<Tensor> bias_spans,
             std::optional<Tensor> row_offsets, int64_t mode) {
  MtpVerifyParams p{};
  if (row_offsets.has_value()) {
    p.row_offsets = data_as<int32_t>(*row_offsets, "row_offsets", DType::i32, {kAny});
    p.B = row_offsets->size(0) - 1;
    GLMX_CHECK(p.B >= 0, "row_offsets: expected at least one offset: got none");
    p.draft_ids = data_as<int64_t>(draft_ids, "draft_ids", DType::i64, {kAny});
    p.R = draft_ids.size(0);
    p.logits = data_as<float>(logits, "logits", DType::f32, {p.R, kAny});
    p.V = logits.size(1);
    p.draft_probs = data_or_null<float>(draft_probs, "draft_probs", DType::f32, {p.R, p.V});
    p.tokens = data_as<int64_t>(tokens, "tokens", DType::i64, {p.R});
  } else {
    p.draft_ids = data_as<int64_t>(draft_ids, "draft_ids", DType::i64, {kAny, kAny});
    p.B = draft_ids.size(0);
    p.K = draft_ids.size(1);
    p.R = p.B * (p.K + 1);
    p.logits = data_as<float>(logits, "logits", DType::f32, {p.B, p.K + 1, kAny});
    p.V = logits.size(2);
    p.draft_probs = data_or_null<float>(draft_probs, "draft_probs", DType::f32, {p.B, p.K, p.V});
    p.tokens = data_as<int64_t>(tokens, "tokens", DType::i64, {p.B, p.K + 1});
  }
  p.accepted = data_as<int64_t>(accepted, "accepted", DType::i64, {p.B});
  p.packed_ids = data_as<int64_t>(packed_ids, "packed_ids", DType::i64, {p.R});
  p.packed_offsets = data_as<int32_t>(packed_offsets, "packed_offsets", DType::i32, {p.B + 1});
  p.rules = sample_rules(p.R, seeds, positions, temperature, top_k, top_p, min_p, token_ids, history, repetition_penalty, presence_penalty,
                         frequency_penalty, bias_ids, bias_values, bias_spans);
  p.mode = static_cast<VerifyMode>(mode);
  run(mtp_verify, p);
}

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY_FRAGMENT(glmx, m) {
  m.def(
      "mtp_verify(Tensor(a!) tokens, Tensor(b!) accepted, Tensor(c!) packed_ids, Tensor(d!) packed_offsets, Tensor draft_ids, "
      "Tensor logits, Tensor? draft_probs, Tensor seeds, Tensor positions, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, "
      "Tensor? token_ids, Tensor? history, Tensor? repetition_penalty, Tensor? presence_penalty, Tensor? frequency_penalty, "
      "Tensor? bias_ids, Tensor? bias_values, Tensor? bias_spans, Tensor? row_offsets, int mode) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(glmx, CPU, m) { m.impl("mtp_verify", TORCH_BOX(&glmx::bind::forward)); }
