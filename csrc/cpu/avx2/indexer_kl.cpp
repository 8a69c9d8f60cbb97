// indexer_kl / avx2: the body of cpu/inl/indexer_kl.inl (which see) compiled for avx2.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "core/workspace.h"
#include "cpu/kernels.h"

namespace glmx::cpu::avx2 {
namespace {
#include "cpu/avx2/vec.h"
#include "cpu/avx2/vec64.h"

constexpr int kRows = 3, kVecs = 1;  // 12 accumulators of 8 lanes, 2 of the panel, 1 broadcast: 15 of 16 registers

#include "cpu/avx2/transpose.h"
#include "cpu/inl/indexer_kl.inl"
}  // namespace

void indexer_kl(const IndexerKlParams& p) { kl_forward(p); }
void indexer_kl_backward(const IndexerKlBackwardParams& p) { kl_backward(p); }
}  // namespace glmx::cpu::avx2
