// head_gemm / avx512: the body of cpu/inl/head_gemm.inl (which see) compiled for avx512.
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
#include "cpu/inl/head_gemm.inl"
}  // namespace

void head_gemm(const HeadGemmParams& p) { head_gemm_heads(p); }
void head_gemm_wgrad(const HeadGemmWgradParams& p) { head_gemm_weights(p); }
}  // namespace glmx::cpu::avx512
