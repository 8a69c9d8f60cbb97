// The entry points of every CPU kernel, declared once for each ISA namespace. ops/<op>.cpp puts them into its table.
#pragma once
#include "glmx/ops.h"

#define GLMX_VECTOR_KERNELS              \
  void rms_norm(const RmsNormParams& p); \
  void rms_norm_backward(const RmsNormBackwardParams& p);

namespace glmx::cpu::base {
GLMX_VECTOR_KERNELS
}
namespace glmx::cpu::avx2 {
GLMX_VECTOR_KERNELS
}
namespace glmx::cpu::avx512 {
GLMX_VECTOR_KERNELS
}
namespace glmx::cpu::amx {}
