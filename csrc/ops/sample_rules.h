// The checks of SampleRules: what sample and mtp_verify refuse before any work.
#pragma once
#include "core/check.h"
#include "glmx/ops.h"

namespace glmx {

inline bool finite(float x) { return x - x == 0.0f; }

inline void check_ids(const char* op, const char* name, const int64_t* ids, int64_t n, int64_t V) {
  for (int64_t i = 0; i < n; ++i) {
    GLMX_CHECK(ids[i] >= 0 && ids[i] < V, op, ": ", name, ": expected ids in [0, ", V, "): got ", ids[i], " at ", i);
  }
}

inline void check_sample_rules(const char* op, const SampleRules& s, int64_t R, int64_t V) {
  GLMX_CHECK(V >= 1 && V <= kSampleVocabulary, op, ": logits: expected a vocabulary of 1 to ", kSampleVocabulary, " tokens: got ", V);
  for (int64_t r = 0; r < R; ++r) {
    const float t = s.temperature[r], top_p = s.top_p[r], min_p = s.min_p[r];
    GLMX_CHECK(t == 0.0f || (t >= 1e-30f && t <= 1e30f), op, ": temperature: expected 0 (greedy) or 1e-30 to 1e30: got ", t, " in row ", r);
    GLMX_CHECK(s.top_k[r] >= 0, op, ": top_k: expected 0 (all) or at least 1: got ", s.top_k[r], " in row ", r);
    GLMX_CHECK(top_p > 0.0f && top_p <= 1.0f, op, ": top_p: expected 0 < top_p <= 1: got ", top_p, " in row ", r);
    GLMX_CHECK(min_p >= 0.0f && min_p <= 1.0f, op, ": min_p: expected 0 <= min_p <= 1: got ", min_p, " in row ", r);
  }
  if (s.history != nullptr) {
    check_ids(op, "token_ids", s.token_ids, s.tokens, V);
    for (int64_t r = 0; r < R; ++r) {
      const int64_t begin = s.history[3 * r], generated = s.history[3 * r + 1], end = s.history[3 * r + 2];
      GLMX_CHECK(0 <= begin && begin <= generated && generated <= end && end <= s.tokens, op,
                 ": history: expected 0 <= begin <= first generated <= end <= ", s.tokens, ", the length of token_ids: got ", begin, ", ",
                 generated, ", ", end, " in row ", r);
      GLMX_CHECK(end - begin < (int64_t{1} << 31), op, ": history: expected fewer than 2^31 tokens: got ", end - begin, " in row ", r);
      const float repetition = s.repetition_penalty[r];
      GLMX_CHECK(repetition > 0.0f && finite(repetition), op, ": repetition_penalty: expected a finite number > 0: got ", repetition,
                 " in row ", r);
      GLMX_CHECK(finite(s.presence_penalty[r]), op, ": presence_penalty: expected a finite number: got ", s.presence_penalty[r], " in row ",
                 r);
      GLMX_CHECK(finite(s.frequency_penalty[r]), op, ": frequency_penalty: expected a finite number: got ", s.frequency_penalty[r],
                 " in row ", r);
    }
  }
  if (s.bias_spans != nullptr) {
    check_ids(op, "bias_ids", s.bias_ids, s.biases, V);
    for (int64_t i = 0; i < s.biases; ++i) {
      GLMX_CHECK(s.bias_values[i] == s.bias_values[i], op, ": bias_values: expected numbers: got NaN at ", i);
    }
    for (int64_t r = 0; r < R; ++r) {
      const int64_t begin = s.bias_spans[2 * r], end = s.bias_spans[2 * r + 1];
      GLMX_CHECK(0 <= begin && begin <= end && end <= s.biases, op, ": bias_spans: expected 0 <= begin <= end <= ", s.biases,
                 ", the length of bias_ids: got ", begin, ", ", end, " in row ", r);
    }
  }
}

}  // namespace glmx
