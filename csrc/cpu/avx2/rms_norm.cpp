// rms_norm / avx2: the body of cpu/inl/rms_norm.inl (which see) compiled for avx2.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace glmx::cpu::avx2 {
namespace {
#include "cpu/avx2/vec.h"
#include "cpu/inl/rms_norm.inl"
}  // namespace

void rms_norm(const RmsNormParams& p) { rms_norm_forward(p); }
void rms_norm_backward(const RmsNormBackwardParams& p) { rms_norm_backward_rows(p); }
}  // namespace glmx::cpu::avx2
