// silu_mul: checks and kernel choice.
#include "core/check.h"
#include "core/dispatch.h"
#include "cpu/kernels.h"
#include "gpu/kernels.h"
#include "ops/registry.h"

namespace glmx {
namespace {
using Forward = void(const SiluMulParams&);
using Backward = void(const SiluMulBackwardParams&);
constexpr Kernel<Forward> kForward[] = {
    {Isa::avx512, cpu::avx512::silu_mul}, {Isa::avx2, cpu::avx2::silu_mul}, {Isa::base, cpu::base::silu_mul}};
constexpr Kernel<Backward> kBackward[] = {
    {Isa::avx512, cpu::avx512::silu_mul_backward}, {Isa::avx2, cpu::avx2::silu_mul_backward}, {Isa::base, cpu::base::silu_mul_backward}};
}  // namespace

OpInfo silu_mul_info() { return op_info("silu_mul", "", kSiluMulRevision, kForward); }

void silu_mul(const SiluMulParams& p) {
  GLMX_CHECK(p.I >= 1, "silu_mul: expected x.shape[-1] >= 2: got ", 2 * p.I);
  if (on_gpu(p.device)) return gpu::launch("silu_mul", &gpu::Kernels::silu_mul, p);
  select(kForward).fn(p);
}

void silu_mul_backward(const SiluMulBackwardParams& p) {
  if (on_gpu(p.device)) return gpu::launch("silu_mul_backward", &gpu::Kernels::silu_mul_backward, p);
  select(kBackward).fn(p);
}

}  // namespace glmx
