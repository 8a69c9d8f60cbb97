// indexer_topk: checks and kernel choice.
#include "core/check.h"
#include "core/dispatch.h"
#include "cpu/kernels.h"
#include "ops/registry.h"
#include "ops/sequences.h"

namespace glmx {
namespace {
using Fn = void(const IndexerTopkParams&);
constexpr Kernel<Fn> kKernels[] = {{Isa::amx, cpu::amx::indexer_topk},
                                   {Isa::avx512_bf16, cpu::avx512_bf16::indexer_topk},
                                   {Isa::avx512, cpu::avx512::indexer_topk},
                                   {Isa::avx2, cpu::avx2::indexer_topk},
                                   {Isa::base, cpu::base::indexer_topk}};
}  // namespace

OpInfo indexer_topk_info(DType operands) { return op_info("indexer_topk", kIndexerTopkRevision, kKernels, operands); }

void indexer_topk(const IndexerTopkParams& p) {
  GLMX_CHECK(p.Hi >= 1, "indexer_topk: expected q.shape[1] >= 1: got ", p.Hi);
  GLMX_CHECK(p.Di >= 1, "indexer_topk: expected q.shape[2] >= 1: got ", p.Di);
  GLMX_CHECK(p.top_k >= 1, "indexer_topk: expected top_k >= 1: got ", p.top_k);
  GLMX_CHECK(p.range_keys >= 0 && p.range_keys % kPageRows == 0, "indexer_topk: expected range_keys to be 0 or a multiple of ", kPageRows,
             ": got ", p.range_keys);
  check_sequences("indexer_topk", p.sequences);
  select(kKernels, p.dtype).fn(p);
}

}  // namespace glmx
