// indexer_topk / avx512_bf16: the body of cpu/inl/indexer_topk.inl (which see), bf16, on words of pairs (pairs.h).
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "core/workspace.h"
#include "cpu/kernels.h"

namespace glmx::cpu::avx512_bf16 {
namespace {
#include "cpu/avx512/vec.h"

constexpr int kRows = 4, kVecs = 2;  // as avx512

#include "cpu/avx512/transpose.h"
#include "cpu/avx512_bf16/pairs.h"
#include "cpu/inl/indexer_topk.inl"
}  // namespace

void indexer_topk(const IndexerTopkParams& p) { index_forward_of<VectorProducts<uint16_t>>(p); }
}  // namespace glmx::cpu::avx512_bf16
