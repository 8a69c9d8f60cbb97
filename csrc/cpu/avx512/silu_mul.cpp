// silu_mul / avx512: the body of cpu/inl/silu_mul.inl (which see) compiled for avx512.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace glmx::cpu::avx512 {
namespace {
#include "cpu/avx512/vec.h"
#include "cpu/inl/silu_mul.inl"
}  // namespace

void silu_mul(const SiluMulParams& p) { silu_mul_rows(p); }
void silu_mul_backward(const SiluMulBackwardParams& p) { silu_mul_backward_rows(p); }
}  // namespace glmx::cpu::avx512
