// silu_mul / avx2: the body of cpu/inl/silu_mul.inl (which see) compiled for avx2.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace glmx::cpu::avx2 {
namespace {
#include "cpu/avx2/vec.h"
#include "cpu/inl/silu_mul.inl"
}  // namespace

void silu_mul(const SiluMulParams& p) { silu_mul_rows(p); }
void silu_mul_backward(const SiluMulBackwardParams& p) { silu_mul_backward_rows(p); }
}  // namespace glmx::cpu::avx2
