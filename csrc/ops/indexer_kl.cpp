// indexer_kl: checks and kernel choice.
#include <algorithm>

#include "core/check.h"
#include "core/dispatch.h"
#include "cpu/kernels.h"
#include "ops/registry.h"
#include "ops/sequences.h"

namespace glmx {
namespace {
using Forward = void(const IndexerKlParams&);
using Backward = void(const IndexerKlBackwardParams&);
constexpr Kernel<Forward> kForward[] = {{Isa::avx512_bf16, cpu::avx512_bf16::indexer_kl},
                                        {Isa::avx512, cpu::avx512::indexer_kl},
                                        {Isa::avx2, cpu::avx2::indexer_kl},
                                        {Isa::base, cpu::base::indexer_kl}};
constexpr Kernel<Backward> kBackward[] = {{Isa::avx512_bf16, cpu::avx512_bf16::indexer_kl_backward},
                                          {Isa::avx512, cpu::avx512::indexer_kl_backward},
                                          {Isa::avx2, cpu::avx2::indexer_kl_backward},
                                          {Isa::base, cpu::base::indexer_kl_backward}};

template <class Params>
void check(const char* op, const Params& p) {
  GLMX_CHECK(p.Hi >= 1 && p.Di >= 1, op, ": expected index_q of at least one head and value: got ", p.Hi, " x ", p.Di);
  GLMX_CHECK(p.A >= 1 && p.Dk >= 1, op, ": expected q of at least one head and value: got ", p.A, " x ", p.Dk);
  GLMX_CHECK(p.scale - p.scale == 0.0f, op, ": expected a finite scale: got ", p.scale);
  GLMX_CHECK(p.sequences.cu_seqlens_k != nullptr, op, ": expected cu_seqlens_k: paged keys are not trained on");
  check_sequences(op, p.sequences);
  if (p.topk_indices != nullptr) check_lists(op, p.sequences, p.topk_indices, p.top_k);
}
}  // namespace

OpInfo indexer_kl_info(DType operands) { return op_info("indexer_kl", kIndexerKlRevision, kForward, operands); }

void indexer_kl(const IndexerKlParams& p) {
  check("indexer_kl", p);
  select(kForward, p.dtype).fn(p);
}

int64_t indexer_kl_score_blocks(const IndexerKlBackwardParams& p) {
  int64_t places = p.topk_indices != nullptr ? p.top_k : 0;
  for (int64_t i = 0; p.topk_indices == nullptr && i < p.sequences.B; ++i) places = std::max<int64_t>(places, p.sequences.seq_lens[i]);
  places = std::min(places, p.sequences.key_rows);  // longer lists are refused
  return std::max<int64_t>(1, (places + kBlockKeys - 1) / kBlockKeys);
}

int64_t indexer_kl_score_tokens(const IndexerKlBackwardParams& p) {
  constexpr int64_t kBytes = int64_t{32} << 20;  // as in sparse_mla: more tokens at a time share the cost of walking the keys' ranges
  const int64_t token = p.score_blocks * p.Hi * kBlockKeys * 4;
  return std::clamp<int64_t>(kBytes / std::max<int64_t>(1, token), 1, std::max<int64_t>(1, p.sequences.T));
}

void indexer_kl_backward(const IndexerKlBackwardParams& p) {
  check("indexer_kl_backward", p);
  GLMX_CHECK(p.score_tokens >= 1, "indexer_kl_backward: expected score_tokens >= 1: got ", p.score_tokens);
  const int64_t blocks = indexer_kl_score_blocks(p);
  GLMX_CHECK(p.score_blocks >= blocks, "indexer_kl_backward: expected score_blocks >= ", blocks, ": got ", p.score_blocks);
  select(kBackward, p.dtype).fn(p);
}

}  // namespace glmx
