// lm_head_logprob on a GPU: what of the vocabulary is in memory at a time, and where it lies in the workspace. The host side
// (ops/lm_head_logprob.cpp) counts the bytes, the kernels' driver (lm_head_logprob.cu) uses them. No shape here is part of the bits.
#pragma once
#include <algorithm>

#include "glmx/ops.h"

namespace glmx::gpu {

// Hands out pieces of the workspace; with no base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t n) {
    const int64_t at = used;
    used += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return base == nullptr ? nullptr : reinterpret_cast<T*>(base + at);
  }
};

// Logits of 16 MB: they stay in the L2 cache of a large card between the product that writes them and the kernels that read them, and
// 1024 tokens by 4096 columns are 256 tiles of 128 x 128, two for each multiprocessor.
inline constexpr int64_t kLmHeadLogits = int64_t{4} << 20;
// The backward's logits and d_logits together: in bf16 four chunks of 1024 tokens.
inline constexpr int64_t kLmHeadGradBytes = int64_t{24} << 20;

// The online softmax of one token.
struct LmHeadState {
  float max;     // of the tempered logits so far; -inf before the first
  float target;  // the tempered logit of its id, once it has passed
  double sum;    // of e^(z - max)
};

// Forward: `rows` tokens by `columns` of the vocabulary (whole chunks) at a time.
struct LmHeadForwardPlan {
  int64_t rows, columns, chunks;
  float* logits;       // [rows, columns]
  float* maxima;       // [rows, chunks]: the largest tempered logit of each chunk
  float* sums;         // [rows, chunks]: of e^(z - the largest of the row so far)
  LmHeadState* state;  // [rows]
  int64_t bytes;
};

inline LmHeadForwardPlan lm_head_plan(const LmHeadLogprobParams& p, void* workspace) {
  LmHeadForwardPlan plan{};
  plan.rows = std::min<int64_t>(std::max<int64_t>(p.T, 1), kLmHeadTokenBlock);
  const int64_t chunks = (p.V + kLmHeadChunk - 1) / kLmHeadChunk;
  plan.chunks = std::clamp<int64_t>(kLmHeadLogits / (plan.rows * kLmHeadChunk), 1, std::max<int64_t>(1, chunks));
  plan.columns = std::min(p.V, plan.chunks * kLmHeadChunk);
  Arena arena{static_cast<char*>(workspace)};
  plan.logits = arena.take<float>(plan.rows * plan.columns);
  plan.maxima = arena.take<float>(plan.rows * plan.chunks);
  plan.sums = arena.take<float>(plan.rows * plan.chunks);
  plan.state = arena.take<LmHeadState>(plan.rows);
  plan.bytes = arena.used;
  return plan;
}

// Backward: blocks of kLmHeadTokenBlock tokens by `groups` chunks at a time. The products take the chunks as experts, as on the CPU. Which
// tokens a block has is known on the device alone, so every array has room for a full one.
struct LmHeadBackwardPlan {
  int64_t rows, groups;
  float* logits;     // [groups, rows, kLmHeadChunk]
  void* d_logits;    // the same in dtype
  float* parts;      // [groups, rows, H]: the dgrad of each chunk
  int32_t* tokens;   // [T]: those that have a gradient
  int32_t* active;   // [1]: how many
  int32_t* gather;   // [groups * rows]: the tokens of the block, once per chunk
  int32_t* offsets;  // [groups + 1]
  int64_t bytes;
};

inline LmHeadBackwardPlan lm_head_plan(const LmHeadLogprobBackwardParams& p, void* workspace) {
  LmHeadBackwardPlan plan{};
  plan.rows = std::min<int64_t>(std::max<int64_t>(p.T, 1), kLmHeadTokenBlock);
  const int64_t group_bytes = plan.rows * kLmHeadChunk * (dtype_size(DType::f32) + dtype_size(p.dtype));
  plan.groups = std::clamp<int64_t>(kLmHeadGradBytes / group_bytes, 1, std::max<int64_t>(1, p.V / kLmHeadChunk));
  const int64_t width = std::min(p.V, kLmHeadChunk);
  Arena arena{static_cast<char*>(workspace)};
  plan.logits = arena.take<float>(plan.groups * plan.rows * width);
  plan.d_logits = arena.take<char>(plan.groups * plan.rows * width * dtype_size(p.dtype));
  plan.parts = arena.take<float>(p.d_hidden == nullptr ? 0 : plan.groups * plan.rows * p.H);
  plan.tokens = arena.take<int32_t>(p.T);
  plan.active = arena.take<int32_t>(1);
  plan.gather = arena.take<int32_t>(plan.groups * plan.rows);
  plan.offsets = arena.take<int32_t>(plan.groups + 1);
  plan.bytes = arena.used;
  return plan;
}

}  // namespace glmx::gpu
