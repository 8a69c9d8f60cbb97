// What the host loop of lm_head_logprob (ops/lm_head_logprob.cpp) asks of the vector kernels, between its GEMMs.
#pragma once
#include <cstdint>

#include "glmx/dtype.h"

namespace glmx::cpu {

// The online softmax of one token.
struct LmHeadState {
  float max;     // of the tempered logits so far; -inf before the first
  float target;  // the tempered logit of its id, once it has passed
  double sum;    // of e^(z - max)
};

// Takes some columns of logits into the state, in steps of `chunk`. top_ids and top_values (tempered logits) hold the best so far.
struct LmHeadScan {
  const float* logits;  // [rows, columns]: columns [first, first + columns) of the vocabulary
  const int64_t* ids;   // [rows]
  LmHeadState* state;   // [rows]
  int32_t* top_ids;     // [rows, top_n]
  float* top_values;    // [rows, top_n]
  int64_t rows, columns, first, chunk, top_n;
  float inverse_temperature;
};

// The results of a token from its state; top_values become log-probs.
struct LmHeadFinish {
  const int64_t* ids;        // [rows]
  const LmHeadState* state;  // [rows]
  float* logprob;            // [rows]
  float* lse;                // [rows]
  float* top_values;         // [rows, top_n]
  int64_t rows, top_n;
};

// d_logits of `groups` chunks of one width, chunk-major as their GEMMs want them.
struct LmHeadDlogits {
  const float* logits;       // [groups, rows, width]
  const int32_t* row_token;  // [rows]: the token of each row
  const float* d_logprob;    // [T]
  const float* d_lse;        // [T], or null
  const int64_t* ids;        // [T]
  const float* lse;          // [T]
  void* d_logits;            // [groups, rows, width] dtype
  int64_t groups, rows, width, first;
  float inverse_temperature;
  DType dtype;
};

// out[row_token[r]] = out[row_token[r]] + parts[0, r] + parts[1, r] + ..., in this order
struct LmHeadAdd {
  const float* parts;        // [groups, rows, H]
  const int32_t* row_token;  // [rows]
  float* out;                // [T, H]
  int64_t groups, rows, H;
};

}  // namespace glmx::cpu
