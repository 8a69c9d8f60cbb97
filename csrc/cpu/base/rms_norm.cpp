// rms_norm / base: the body of cpu/inl/rms_norm.inl (which see) compiled for base.
#include <emmintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace glmx::cpu::base {
namespace {
#include "cpu/base/vec.h"
#include "cpu/inl/rms_norm.inl"
}  // namespace

void rms_norm(const RmsNormParams& p) { rms_norm_forward(p); }
void rms_norm_backward(const RmsNormBackwardParams& p) { rms_norm_backward_rows(p); }
}  // namespace glmx::cpu::base
