// layer_norm / avx512: the body of cpu/inl/layer_norm.inl (which see) compiled for avx512.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace glmx::cpu::avx512 {
namespace {
#include "cpu/avx512/vec.h"
#include "cpu/inl/layer_norm.inl"
}  // namespace

void layer_norm(const LayerNormParams& p) { layer_norm_forward(p); }
void layer_norm_backward(const LayerNormBackwardParams& p) { layer_norm_backward_rows(p); }
}  // namespace glmx::cpu::avx512
