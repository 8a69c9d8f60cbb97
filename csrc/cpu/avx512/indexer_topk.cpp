// indexer_topk / avx512: the body of cpu/inl/indexer_topk.inl (which see) compiled for avx512.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "core/workspace.h"
#include "cpu/kernels.h"

namespace glmx::cpu::avx512 {
namespace {
#include "cpu/avx512/vec.h"

constexpr int kRows = 4, kVecs = 2;  // 16 accumulators, 2 of the panel, 1 broadcast

#include "cpu/avx512/transpose.h"
#include "cpu/inl/indexer_topk.inl"
}  // namespace

void indexer_topk(const IndexerTopkParams& p) { index_forward(p); }
}  // namespace glmx::cpu::avx512
