// layer_norm / base: the body of cpu/inl/layer_norm.inl (which see) compiled for base.
#include <emmintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace glmx::cpu::base {
namespace {
#include "cpu/base/vec.h"
#include "cpu/inl/layer_norm.inl"
}  // namespace

void layer_norm(const LayerNormParams& p) { layer_norm_forward(p); }
void layer_norm_backward(const LayerNormBackwardParams& p) { layer_norm_backward_rows(p); }
}  // namespace glmx::cpu::base
