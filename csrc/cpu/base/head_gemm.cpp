// head_gemm / base: the body of cpu/inl/head_gemm.inl (which see) compiled for base.
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
#include "cpu/inl/head_gemm.inl"
}  // namespace

void head_gemm(const HeadGemmParams& p) { head_gemm_heads(p); }
void head_gemm_wgrad(const HeadGemmWgradParams& p) { head_gemm_weights(p); }
}  // namespace glmx::cpu::base
