// layer_norm: checks and kernel choice.
#include "core/check.h"
#include "core/dispatch.h"
#include "cpu/kernels.h"
#include "gpu/kernels.h"
#include "ops/registry.h"

namespace glmx {
namespace {
using Forward = void(const LayerNormParams&);
using Backward = void(const LayerNormBackwardParams&);
constexpr Kernel<Forward> kForward[] = {
    {Isa::avx512, cpu::avx512::layer_norm}, {Isa::avx2, cpu::avx2::layer_norm}, {Isa::base, cpu::base::layer_norm}};
constexpr Kernel<Backward> kBackward[] = {{Isa::avx512, cpu::avx512::layer_norm_backward},
                                          {Isa::avx2, cpu::avx2::layer_norm_backward},
                                          {Isa::base, cpu::base::layer_norm_backward}};
}  // namespace

OpInfo layer_norm_info() { return op_info("layer_norm", "", kLayerNormRevision, kForward); }

void layer_norm(const LayerNormParams& p) {
  GLMX_CHECK(p.H >= 1, "layer_norm: expected x.shape[-1] >= 1: got ", p.H);
  GLMX_CHECK(p.eps >= 0.0f, "layer_norm: expected eps >= 0: got ", p.eps);
  if (on_gpu(p.device)) return gpu::launch("layer_norm", &gpu::Kernels::layer_norm, p);
  select(kForward).fn(p);
}

void layer_norm_backward(const LayerNormBackwardParams& p) {
  if (on_gpu(p.device)) return gpu::launch("layer_norm_backward", &gpu::Kernels::layer_norm_backward, p);
  select(kBackward).fn(p);
}

}  // namespace glmx
