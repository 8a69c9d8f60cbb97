// adamw: kernel choice.
#include "core/dispatch.h"
#include "cpu/kernels.h"
#include "ops/registry.h"

namespace glmx {
namespace {
using Update = void(const AdamwParams&);
constexpr Kernel<Update> kUpdate[] = {{Isa::avx512, cpu::avx512::adamw}, {Isa::avx2, cpu::avx2::adamw}, {Isa::base, cpu::base::adamw}};
}  // namespace

OpInfo adamw_info() { return op_info("adamw", "", kAdamwRevision, kUpdate); }

void adamw(const AdamwParams& p) { select(kUpdate).fn(p); }

}  // namespace glmx
