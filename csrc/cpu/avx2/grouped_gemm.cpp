// grouped_gemm / avx2: the body of cpu/inl/grouped_gemm.inl (which see) compiled for avx2.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "core/workspace.h"
#include "cpu/kernels.h"

namespace glmx::cpu::avx2 {
namespace {
#include "cpu/avx2/vec.h"

constexpr int kRows = 3, kVecs = 1;  // 12 accumulators of 8 lanes, 2 of the panel, 1 broadcast: 15 of 16 registers

#include "cpu/avx2/stored.h"
#include "cpu/avx2/transpose.h"
#include "cpu/inl/grouped_gemm.inl"
}  // namespace

void grouped_gemm(const GroupedGemmParams& p) { gemm_forward(p); }
void grouped_gemm_dgrad(const GroupedGemmDgradParams& p) { gemm_dgrad(p); }
void grouped_gemm_wgrad(const GroupedGemmWgradParams& p) { gemm_wgrad(p); }
void grouped_gemm_bias_grad(const GroupedGemmBiasGradParams& p) { bias_gradient(p); }
}  // namespace glmx::cpu::avx2
