// moe_combine / avx2: the body of cpu/inl/moe_combine.inl (which see) compiled for avx2.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace glmx::cpu::avx2 {
namespace {
#include "cpu/avx2/vec.h"
#include "cpu/inl/moe_combine.inl"
}  // namespace

void moe_combine(const MoeCombineParams& p) { moe_combine_forward(p); }
void moe_combine_backward(const MoeCombineBackwardParams& p) { moe_combine_backward_rows(p); }
}  // namespace glmx::cpu::avx2
