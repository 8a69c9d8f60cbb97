// rms_norm / avx512: the body of cpu/inl/rms_norm.inl (which see) compiled for avx512.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace glmx::cpu::avx512 {
namespace {
#include "cpu/avx512/vec.h"
#include "cpu/inl/rms_norm.inl"
}  // namespace

void rms_norm(const RmsNormParams& p) { rms_norm_forward(p); }
void rms_norm_backward(const RmsNormBackwardParams& p) { rms_norm_backward_rows(p); }
}  // namespace glmx::cpu::avx512
