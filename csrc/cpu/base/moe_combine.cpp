// moe_combine / base: the body of cpu/inl/moe_combine.inl (which see) compiled for base.
#include <emmintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace glmx::cpu::base {
namespace {
#include "cpu/base/vec.h"
#include "cpu/inl/moe_combine.inl"
}  // namespace

void moe_combine(const MoeCombineParams& p) { moe_combine_forward(p); }
void moe_combine_backward(const MoeCombineBackwardParams& p) { moe_combine_backward_rows(p); }
}  // namespace glmx::cpu::base
