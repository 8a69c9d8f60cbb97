// silu_mul / base: the body of cpu/inl/silu_mul.inl (which see) compiled for base.
#include <emmintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace glmx::cpu::base {
namespace {
#include "cpu/base/vec.h"
#include "cpu/inl/silu_mul.inl"
}  // namespace

void silu_mul(const SiluMulParams& p) { silu_mul_rows(p); }
void silu_mul_backward(const SiluMulBackwardParams& p) { silu_mul_backward_rows(p); }
}  // namespace glmx::cpu::base
