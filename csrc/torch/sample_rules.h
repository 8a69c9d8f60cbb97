// Unpacks the tensors of SampleRules, which sample and mtp_verify share. Rows: the leading dimensions of the logits, flat.
#pragma once
#include "torch/bind.h"

namespace glmx::bind {

using Given = const std::optional<Tensor>&;

inline SampleRules sample_rules(int64_t R, const Tensor& seeds, const Tensor& positions, const Tensor& temperature, const Tensor& top_k,
                                const Tensor& top_p, const Tensor& min_p, Given token_ids, Given history, Given repetition_penalty,
                                Given presence_penalty, Given frequency_penalty, Given bias_ids, Given bias_values, Given bias_spans) {
  SampleRules s{};
  s.seeds = data_as<int64_t>(seeds, "seeds", DType::i64, {R});
  s.positions = data_as<int64_t>(positions, "positions", DType::i64, {R});
  s.temperature = data_as<float>(temperature, "temperature", DType::f32, {R});
  s.top_k = data_as<int64_t>(top_k, "top_k", DType::i64, {R});
  s.top_p = data_as<float>(top_p, "top_p", DType::f32, {R});
  s.min_p = data_as<float>(min_p, "min_p", DType::f32, {R});
  GLMX_CHECK(token_ids.has_value() == history.has_value(), "history: expected token_ids and history together: got one of them");
  if (history.has_value()) {
    GLMX_CHECK(repetition_penalty.has_value() && presence_penalty.has_value() && frequency_penalty.has_value(),
               "history: expected all three penalties with it");
    s.history = data_as<int64_t>(*history, "history", DType::i64, {R, 3});
    s.token_ids = data_as<int64_t>(*token_ids, "token_ids", DType::i64, {kAny});
    s.tokens = token_ids->size(0);
    s.repetition_penalty = data_as<float>(*repetition_penalty, "repetition_penalty", DType::f32, {R});
    s.presence_penalty = data_as<float>(*presence_penalty, "presence_penalty", DType::f32, {R});
    s.frequency_penalty = data_as<float>(*frequency_penalty, "frequency_penalty", DType::f32, {R});
  }
  const bool biased = bias_spans.has_value();
  GLMX_CHECK(bias_ids.has_value() == biased && bias_values.has_value() == biased,
             "bias_spans: expected bias_ids, bias_values and bias_spans together: got some of them");
  if (biased) {
    s.bias_ids = data_as<int64_t>(*bias_ids, "bias_ids", DType::i64, {kAny});
    s.biases = bias_ids->size(0);
    s.bias_values = data_as<float>(*bias_values, "bias_values", DType::f32, {s.biases});
    s.bias_spans = data_as<int64_t>(*bias_spans, "bias_spans", DType::i64, {R, 2});
  }
  return s;
}

}  // namespace glmx::bind
