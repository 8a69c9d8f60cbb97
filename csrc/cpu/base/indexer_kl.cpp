// indexer_kl / base: the body of cpu/inl/indexer_kl.inl (which see) compiled for base.
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
#include "cpu/base/vec64.h"

constexpr int kRows = 4, kVecs = 1;  // sixteen lanes are an array here: the size bounds nothing

#include "cpu/base/transpose.h"
#include "cpu/inl/indexer_kl.inl"
}  // namespace

void indexer_kl(const IndexerKlParams& p) { kl_forward(p); }
void indexer_kl_backward(const IndexerKlBackwardParams& p) { kl_backward(p); }
}  // namespace glmx::cpu::base
