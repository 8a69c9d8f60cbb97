// add_rms_norm: checks and kernel choice.
#include "core/check.h"
#include "core/dispatch.h"
#include "cpu/kernels.h"
#include "gpu/kernels.h"
#include "ops/registry.h"

namespace glmx {
namespace {
using Forward = void(const AddRmsNormParams&);
constexpr Kernel<Forward> kForward[] = {
    {Isa::avx512, cpu::avx512::add_rms_norm}, {Isa::avx2, cpu::avx2::add_rms_norm}, {Isa::base, cpu::base::add_rms_norm}};
}  // namespace

OpInfo add_rms_norm_info() { return op_info("add_rms_norm", "", kAddRmsNormRevision, kForward); }

void add_rms_norm(const AddRmsNormParams& p) {
  GLMX_CHECK(p.H >= 1, "add_rms_norm: expected x.shape[-1] >= 1: got ", p.H);
  GLMX_CHECK(p.eps >= 0.0f, "add_rms_norm: expected eps >= 0: got ", p.eps);
  if (on_gpu(p.device)) return gpu::launch("add_rms_norm", &gpu::Kernels::add_rms_norm, p);
  select(kForward).fn(p);
}

}  // namespace glmx
