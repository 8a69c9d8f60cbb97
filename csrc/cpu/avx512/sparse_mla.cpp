// sparse_mla / avx512: the body of cpu/inl/sparse_mla.inl (which see) compiled for avx512.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "core/workspace.h"
#include "cpu/kernels.h"

namespace glmx::cpu::avx512 {
namespace {
#include "cpu/avx512/vec.h"
#include "cpu/avx512/vec64.h"

constexpr int kRows = 4, kVecs = 2;  // 16 accumulators, 2 of the panel, 1 broadcast

#include "cpu/avx512/transpose.h"
#include "cpu/inl/sparse_mla.inl"
}  // namespace

void sparse_mla(const SparseMlaParams& p) { mla_forward(p); }
void sparse_mla_backward(const SparseMlaBackwardParams& p) { mla_backward(p); }
}  // namespace glmx::cpu::avx512
