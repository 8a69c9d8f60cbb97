// head_gemm / avx512_bf16: the body of cpu/inl/head_gemm.inl (which see), bf16, on words of pairs (pairs.h).
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "core/workspace.h"
#include "cpu/kernels.h"

namespace glmx::cpu::avx512_bf16 {
namespace {
#include "cpu/avx512/vec.h"

constexpr int kRows = 4, kVecs = 2;  // as avx512

#include "cpu/avx512/transpose.h"
#include "cpu/avx512_bf16/pairs.h"
#include "cpu/inl/head_gemm.inl"
}  // namespace

void head_gemm(const HeadGemmParams& p) { run_heads<uint16_t>(p); }
void head_gemm_wgrad(const HeadGemmWgradParams& p) { run(HeadWgrad<uint16_t>{p}); }
}  // namespace glmx::cpu::avx512_bf16
