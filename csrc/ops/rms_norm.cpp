// rms_norm: checks and kernel choice.
#include "core/check.h"
#include "core/dispatch.h"
#include "cpu/kernels.h"
#include "gpu/kernels.h"
#include "ops/registry.h"

namespace glmx {
namespace {
using Forward = void(const RmsNormParams&);
using Backward = void(const RmsNormBackwardParams&);
constexpr Kernel<Forward> kForward[] = {
    {Isa::avx512, cpu::avx512::rms_norm}, {Isa::avx2, cpu::avx2::rms_norm}, {Isa::base, cpu::base::rms_norm}};
constexpr Kernel<Backward> kBackward[] = {
    {Isa::avx512, cpu::avx512::rms_norm_backward}, {Isa::avx2, cpu::avx2::rms_norm_backward}, {Isa::base, cpu::base::rms_norm_backward}};
}  // namespace

OpInfo rms_norm_info() { return op_info("rms_norm", "", kRmsNormRevision, kForward); }

void rms_norm(const RmsNormParams& p) {
  GLMX_CHECK(p.H >= 1, "rms_norm: expected x.shape[-1] >= 1: got ", p.H);
  GLMX_CHECK(p.eps >= 0.0f, "rms_norm: expected eps >= 0: got ", p.eps);
  if (on_gpu(p.device)) return gpu::launch("rms_norm", &gpu::Kernels::rms_norm, p);
  select(kForward).fn(p);
}

void rms_norm_backward(const RmsNormBackwardParams& p) {
  if (on_gpu(p.device)) return gpu::launch("rms_norm_backward", &gpu::Kernels::rms_norm_backward, p);
  select(kBackward).fn(p);
}

}  // namespace glmx
