// sparse_mla / avx2: the body of cpu/inl/sparse_mla.inl (which see) compiled for avx2.
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
#include "cpu/inl/sparse_mla.inl"
}  // namespace

void sparse_mla(const SparseMlaParams& p) { mla_forward(p); }
void sparse_mla_backward(const SparseMlaBackwardParams& p) { mla_backward(p); }
}  // namespace glmx::cpu::avx2
