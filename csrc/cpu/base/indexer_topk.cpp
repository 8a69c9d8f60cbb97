// indexer_topk / base: the body of cpu/inl/indexer_topk.inl (which see) compiled for base.
#include <emmintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "core/workspace.h"
#include "cpu/kernels.h"

namespace glmx::cpu::base {
namespace {
#include "cpu/base/vec.h"

constexpr int kRows = 4, kVecs = 1;  // sixteen lanes are an array here: the size bounds nothing

#include "cpu/base/transpose.h"
#include "cpu/inl/indexer_topk.inl"
}  // namespace

void indexer_topk(const IndexerTopkParams& p) { index_forward(p); }
}  // namespace glmx::cpu::base
