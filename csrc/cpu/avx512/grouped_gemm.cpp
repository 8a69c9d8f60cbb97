// grouped_gemm / avx512: the body of cpu/inl/grouped_gemm.inl (which see) compiled for avx512.
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

#include "cpu/avx512/stored.h"
#include "cpu/avx512/transpose.h"
#include "cpu/inl/grouped_gemm.inl"
}  // namespace

void grouped_gemm(const GroupedGemmParams& p) { gemm_forward(p); }
void grouped_gemm_dgrad(const GroupedGemmDgradParams& p) { gemm_dgrad(p); }
void grouped_gemm_wgrad(const GroupedGemmWgradParams& p) { gemm_wgrad(p); }
void grouped_gemm_bias_grad(const GroupedGemmBiasGradParams& p) { bias_gradient(p); }
}  // namespace glmx::cpu::avx512
