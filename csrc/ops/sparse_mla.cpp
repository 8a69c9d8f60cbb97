// sparse_mla: checks and kernel choice.
#include <algorithm>

#include "core/check.h"
#include "core/dispatch.h"
#include "cpu/kernels.h"
#include "ops/registry.h"
#include "ops/sequences.h"

namespace glmx {
namespace {
using Forward = void(const SparseMlaParams&);
using Backward = void(const SparseMlaBackwardParams&);
constexpr Kernel<Forward> kForward[] = {{Isa::amx, cpu::amx::sparse_mla},
                                        {Isa::avx512_bf16, cpu::avx512_bf16::sparse_mla},
                                        {Isa::avx512, cpu::avx512::sparse_mla},
                                        {Isa::avx2, cpu::avx2::sparse_mla},
                                        {Isa::base, cpu::base::sparse_mla}};
constexpr Kernel<Backward> kBackward[] = {{Isa::amx, cpu::amx::sparse_mla_backward},
                                          {Isa::avx512_bf16, cpu::avx512_bf16::sparse_mla_backward},
                                          {Isa::avx512, cpu::avx512::sparse_mla_backward},
                                          {Isa::avx2, cpu::avx2::sparse_mla_backward},
                                          {Isa::base, cpu::base::sparse_mla_backward}};

template <class Params>
void check(const char* op, const Params& p) {
  GLMX_CHECK(p.A >= 1, op, ": expected q.shape[1] >= 1: got ", p.A);
  GLMX_CHECK(p.Dv >= 1 && p.Dv <= p.Dk, op, ": expected 1 <= v_dim <= kv.shape[1] == ", p.Dk, ": got ", p.Dv);
  GLMX_CHECK(p.scale - p.scale == 0.0f, op, ": expected a finite scale: got ", p.scale);
  check_sequences(op, p.sequences);
  check_lists(op, p.sequences, p.topk_indices, p.top_k);
}
}  // namespace

OpInfo sparse_mla_info(DType operands) { return op_info("sparse_mla", kSparseMlaRevision, kForward, operands); }

void sparse_mla(const SparseMlaParams& p) {
  check("sparse_mla", p);
  select(kForward, p.dtype).fn(p);
}

int64_t sparse_mla_score_tokens(const SparseMlaBackwardParams& p) {
  constexpr int64_t kBytes = int64_t{32} << 20;  // of scores: more tokens at a time share the cost of walking the cache's ranges
  const int64_t blocks = std::max<int64_t>(1, (p.top_k + kBlockKeys - 1) / kBlockKeys), token = 2 * blocks * p.A * kBlockKeys * 4;
  return std::clamp<int64_t>(kBytes / token, 1, std::max<int64_t>(1, p.sequences.T));
}

void sparse_mla_backward(const SparseMlaBackwardParams& p) {
  check("sparse_mla_backward", p);
  GLMX_CHECK(p.sequences.cu_seqlens_k != nullptr, "sparse_mla_backward: expected cu_seqlens_k: paged keys have no gradient");
  GLMX_CHECK(p.score_tokens >= 1, "sparse_mla_backward: expected score_tokens >= 1: got ", p.score_tokens);
  select(kBackward, p.dtype).fn(p);
}

}  // namespace glmx
