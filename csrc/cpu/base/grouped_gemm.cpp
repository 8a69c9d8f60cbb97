// grouped_gemm / base: the body of cpu/inl/grouped_gemm.inl (which see) compiled for base.
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

#include "cpu/base/stored.h"
#include "cpu/base/transpose.h"
#include "cpu/inl/grouped_gemm.inl"
}  // namespace

void grouped_gemm(const GroupedGemmParams& p) { gemm_forward(p); }
void grouped_gemm_dgrad(const GroupedGemmDgradParams& p) { gemm_dgrad(p); }
void grouped_gemm_wgrad(const GroupedGemmWgradParams& p) { gemm_wgrad(p); }
void grouped_gemm_bias_grad(const GroupedGemmBiasGradParams& p) { bias_gradient(p); }
}  // namespace glmx::cpu::base
