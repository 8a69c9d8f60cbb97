// lm_head_logprob: the loop over blocks of tokens and chunks of the vocabulary: a GEMM into a buffer, then a vector kernel over it.
// The buffer's shape follows the number of threads; the bits do not (ops.h says what they follow).
#include <algorithm>
#include <cstring>

#include "core/check.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "cpu/kernels.h"
#include "gpu/kernels.h"
#include "gpu/lm_head_logprob.h"
#include "ops/registry.h"

namespace glmx {
namespace {
using Scan = void(const cpu::LmHeadScan&);
using Finish = void(const cpu::LmHeadFinish&);
using Dlogits = void(const cpu::LmHeadDlogits&);
using Add = void(const cpu::LmHeadAdd&);
constexpr Kernel<Scan> kScan[] = {
    {Isa::avx512, cpu::avx512::lm_head_scan}, {Isa::avx2, cpu::avx2::lm_head_scan}, {Isa::base, cpu::base::lm_head_scan}};
constexpr Kernel<Finish> kFinish[] = {
    {Isa::avx512, cpu::avx512::lm_head_finish}, {Isa::avx2, cpu::avx2::lm_head_finish}, {Isa::base, cpu::base::lm_head_finish}};
constexpr Kernel<Dlogits> kDlogits[] = {
    {Isa::avx512, cpu::avx512::lm_head_d_logits}, {Isa::avx2, cpu::avx2::lm_head_d_logits}, {Isa::base, cpu::base::lm_head_d_logits}};
constexpr Kernel<Add> kAdd[] = {
    {Isa::avx512, cpu::avx512::lm_head_add}, {Isa::avx2, cpu::avx2::lm_head_add}, {Isa::base, cpu::base::lm_head_add}};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t align(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

const void* rows_from(const void* tensor, int64_t row, int64_t columns, DType dtype) {
  return static_cast<const char*>(tensor) + row * columns * dtype_size(dtype);
}

// Hands out pieces of the workspace; with no base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t n) {
    const int64_t at = used;
    used += align(n * static_cast<int64_t>(sizeof(T)));
    return base == nullptr ? nullptr : reinterpret_cast<T*>(base + at);
  }
};

// Forward: `rows` tokens by `columns` of the vocabulary (whole chunks) at a time.
struct ForwardPlan {
  int64_t rows, columns;
  float* logits;            // [rows, columns]
  cpu::LmHeadState* state;  // [rows]
  int64_t bytes;
};

ForwardPlan forward_plan(const LmHeadLogprobParams& p, void* workspace) {
  ForwardPlan plan{};
  plan.rows = std::min<int64_t>(std::max<int64_t>(p.T, 1), kLmHeadTokenBlock);
  // 4 MB of logits for up to four threads, more for more: an item of the GEMM is about 256 x 256, and there should be enough of them.
  const int64_t budget = kLmHeadTokenBlock * kLmHeadChunk * std::max<int64_t>(1, parallel_threads() / 4);
  const int64_t chunks = std::clamp<int64_t>(budget / (plan.rows * kLmHeadChunk), 1, std::max<int64_t>(1, ceil_div(p.V, kLmHeadChunk)));
  plan.columns = std::min(p.V, chunks * kLmHeadChunk);
  Arena arena{static_cast<char*>(workspace)};
  plan.logits = arena.take<float>(plan.rows * plan.columns);
  plan.state = arena.take<cpu::LmHeadState>(plan.rows);
  plan.bytes = arena.used;
  return plan;
}

// Backward: blocks of kLmHeadTokenBlock tokens by `groups` chunks at a time. The GEMMs take the chunks as experts: each has its own
// logits [rows, width], its own dgrad and its own rows of d_weight, all in one call.
struct BackwardPlan {
  int64_t rows, groups;
  float* logits;     // [groups, rows, kLmHeadChunk]
  void* d_logits;    // the same in dtype
  float* parts;      // [groups, rows, H]: the dgrad of each chunk
  int32_t* tokens;   // [T]: those that have a gradient
  int32_t* gather;   // [groups * rows]: the tokens of the block, once per chunk
  int32_t* offsets;  // [groups + 1]
  int64_t bytes;
};

BackwardPlan backward_plan(const LmHeadLogprobBackwardParams& p, void* workspace) {
  BackwardPlan plan{};
  plan.rows = std::min<int64_t>(std::max<int64_t>(p.T, 1), kLmHeadTokenBlock);
  // dgrad has about four items of 256 x 256 per 256 columns of H and chunk: two for each thread.
  const int64_t wanted = ceil_div(2 * parallel_threads() * kLmHeadTokenBlock, 4 * ceil_div(p.H, 256) * plan.rows);
  plan.groups = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, p.V / kLmHeadChunk));
  const int64_t width = std::min(p.V, kLmHeadChunk);
  Arena arena{static_cast<char*>(workspace)};
  plan.logits = arena.take<float>(plan.groups * plan.rows * width);
  plan.d_logits = arena.take<char>(plan.groups * plan.rows * width * dtype_size(p.dtype));
  plan.parts = arena.take<float>(p.d_hidden == nullptr ? 0 : plan.groups * plan.rows * p.H);
  plan.tokens = arena.take<int32_t>(p.T);
  plan.gather = arena.take<int32_t>(plan.groups * plan.rows);
  plan.offsets = arena.take<int32_t>(plan.groups + 1);
  plan.bytes = arena.used;
  return plan;
}

void check_sizes(int64_t T, int64_t V, int64_t H, float temperature) {
  GLMX_CHECK(T < (int64_t{1} << 31), "lm_head_logprob: expected fewer than 2^31 tokens: got ", T);
  GLMX_CHECK(V >= 1 && V < (int64_t{1} << 31), "lm_head_logprob: expected 1 <= weight.shape[0] < 2^31: got ", V);
  GLMX_CHECK(H >= 1, "lm_head_logprob: expected hidden.shape[1] >= 1: got ", H);
  GLMX_CHECK(temperature > 0.0f && 1.0f / temperature > 0.0f && 1.0f / temperature < __builtin_inff(),
             "lm_head_logprob: expected a finite temperature > 0: got ", temperature);
}

void check_ids(const int64_t* ids, int64_t T, int64_t V) {
  for (int64_t t = 0; t < T; ++t) {
    GLMX_CHECK(ids[t] >= -1 && ids[t] < V, "lm_head_logprob: expected ids in [0, ", V, ") or -1: got ", ids[t], " at ", t);
  }
}

}  // namespace

OpInfo lm_head_logprob_info() { return op_info("lm_head_logprob", "", kLmHeadLogprobRevision, kScan); }

int64_t lm_head_logprob_workspace(const LmHeadLogprobParams& p) {
  return on_gpu(p.device) ? gpu::lm_head_plan(p, nullptr).bytes : forward_plan(p, nullptr).bytes;
}

void lm_head_logprob(const LmHeadLogprobParams& p) {
  check_sizes(p.T, p.V, p.H, p.temperature);
  if (host_reads(p.device)) check_ids(p.ids, p.T, p.V);
  GLMX_CHECK(p.top_n >= 0 && p.top_n <= p.V, "lm_head_logprob: expected 0 <= top_n <= ", p.V, ": got ", p.top_n);
  if (on_gpu(p.device)) return gpu::launch("lm_head_logprob", &gpu::Kernels::lm_head_logprob, p);
  const ForwardPlan plan = forward_plan(p, p.workspace);
  for (int64_t t = 0; t < p.T; t += plan.rows) {
    const int64_t rows = std::min(plan.rows, p.T - t);
    const int32_t offsets[2] = {0, static_cast<int32_t>(rows)};
    int32_t* top_ids = p.top_n == 0 ? nullptr : p.top_ids + t * p.top_n;
    float* top_values = p.top_n == 0 ? nullptr : p.top_logprobs + t * p.top_n;
    for (int64_t v = 0; v < p.V; v += plan.columns) {
      const int64_t columns = std::min(plan.columns, p.V - v);
      GroupedGemmParams gemm{};
      gemm.x = rows_from(p.hidden, t, p.H, p.dtype);
      gemm.w = rows_from(p.weight, v, p.H, p.dtype);
      gemm.expert_offsets = offsets;
      gemm.out = plan.logits;
      gemm.M = gemm.R = rows;
      gemm.N = columns;
      gemm.K = p.H;
      gemm.E = 1;
      gemm.dtype = p.dtype;
      gemm.out_dtype = DType::f32;
      grouped_gemm(gemm);
      select(kScan).fn(
          {plan.logits, p.ids + t, plan.state, top_ids, top_values, rows, columns, v, kLmHeadChunk, p.top_n, 1.0f / p.temperature});
    }
    select(kFinish).fn({p.ids + t, plan.state, p.logprob + t, p.lse + t, top_values, rows, p.top_n});
  }
}

int64_t lm_head_logprob_backward_workspace(const LmHeadLogprobBackwardParams& p) {
  return on_gpu(p.device) ? gpu::lm_head_plan(p, nullptr).bytes : backward_plan(p, nullptr).bytes;
}

void lm_head_logprob_backward(const LmHeadLogprobBackwardParams& p) {
  check_sizes(p.T, p.V, p.H, p.temperature);
  if (host_reads(p.device)) check_ids(p.ids, p.T, p.V);
  if (on_gpu(p.device)) return gpu::launch("lm_head_logprob_backward", &gpu::Kernels::lm_head_logprob_backward, p);
  const BackwardPlan plan = backward_plan(p, p.workspace);
  int64_t active = 0;
  for (int64_t t = 0; t < p.T; ++t) {
    const bool through_logprob = p.ids[t] >= 0 && p.d_logprob[t] != 0.0f, through_lse = p.d_lse != nullptr && p.d_lse[t] != 0.0f;
    if (through_logprob || through_lse) plan.tokens[active++] = static_cast<int32_t>(t);
  }
  if (p.d_hidden != nullptr) std::memset(p.d_hidden, 0, static_cast<size_t>(p.T * p.H) * sizeof(float));
  if (p.d_weight != nullptr && !p.accumulate && active == 0) std::memset(p.d_weight, 0, static_cast<size_t>(p.V * p.H) * sizeof(float));

  for (int64_t begin = 0; begin < active; begin += plan.rows) {
    const int64_t rows = std::min(plan.rows, active - begin);
    const int32_t* tokens = plan.tokens + begin;
    for (int64_t g = 0; g < plan.groups; ++g) std::copy_n(tokens, rows, plan.gather + g * rows);
    for (int64_t g = 0; g <= plan.groups; ++g) plan.offsets[g] = static_cast<int32_t>(g * rows);
    for (int64_t v = 0, groups = 0; v < p.V; v += groups * kLmHeadChunk) {
      const int64_t width = std::min(kLmHeadChunk, p.V - v);
      groups = std::clamp<int64_t>((p.V - v) / kLmHeadChunk, 1, plan.groups);
      const void* weight = rows_from(p.weight, v, p.H, p.dtype);

      GroupedGemmParams gemm{};
      gemm.x = p.hidden;
      gemm.w = weight;
      gemm.expert_offsets = plan.offsets;
      gemm.row_token = plan.gather;
      gemm.out = plan.logits;
      gemm.M = p.T;
      gemm.R = groups * rows;
      gemm.N = width;
      gemm.K = p.H;
      gemm.E = groups;
      gemm.dtype = p.dtype;
      gemm.out_dtype = DType::f32;
      grouped_gemm(gemm);
      select(kDlogits).fn(
          {plan.logits, tokens, p.d_logprob, p.d_lse, p.ids, p.lse, plan.d_logits, groups, rows, width, v, 1.0f / p.temperature, p.dtype});
      if (p.d_hidden != nullptr) {
        GroupedGemmDgradParams dgrad{};
        dgrad.dy = plan.d_logits;
        dgrad.w = weight;
        dgrad.expert_offsets = plan.offsets;
        dgrad.dx = plan.parts;
        dgrad.R = groups * rows;
        dgrad.N = width;
        dgrad.K = p.H;
        dgrad.E = groups;
        dgrad.dtype = p.dtype;
        dgrad.out_dtype = DType::f32;
        grouped_gemm_dgrad(dgrad);
        select(kAdd).fn({plan.parts, tokens, p.d_hidden, groups, rows, p.H});
      }
      if (p.d_weight != nullptr) {
        GroupedGemmWgradParams wgrad{};
        wgrad.dy = plan.d_logits;
        wgrad.x = p.hidden;
        wgrad.expert_offsets = plan.offsets;
        wgrad.row_token = plan.gather;
        wgrad.dw = p.d_weight + v * p.H;
        wgrad.M = p.T;
        wgrad.R = groups * rows;
        wgrad.N = width;
        wgrad.K = p.H;
        wgrad.E = groups;
        wgrad.dtype = p.dtype;
        wgrad.out_dtype = DType::f32;
        wgrad.accumulate = p.accumulate || begin > 0;
        grouped_gemm_wgrad(wgrad);
      }
    }
  }
}

}  // namespace glmx
