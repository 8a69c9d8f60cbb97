// rope: checks and kernel choice.
#include "core/check.h"
#include "core/dispatch.h"
#include "cpu/kernels.h"
#include "gpu/kernels.h"
#include "ops/registry.h"

namespace glmx {
namespace {
using CosSin = void(const RopeCosSinParams&);
using Rotate = void(const RopeParams&);
constexpr Kernel<CosSin> kCosSin[] = {
    {Isa::avx512, cpu::avx512::rope_cos_sin}, {Isa::avx2, cpu::avx2::rope_cos_sin}, {Isa::base, cpu::base::rope_cos_sin}};
constexpr Kernel<Rotate> kRotate[] = {{Isa::avx512, cpu::avx512::rope}, {Isa::avx2, cpu::avx2::rope}, {Isa::base, cpu::base::rope}};

// Below 2^31 every step of the reduction keeps its error bound.
constexpr int64_t kMaxPosition = int64_t{1} << 31;
}  // namespace

OpInfo rope_info() { return op_info("rope", "", kRopeRevision, kRotate); }

void rope_cos_sin(const RopeCosSinParams& p) {
  GLMX_CHECK(p.half >= 1, "rope_cos_sin: expected rotary_dim >= 2: got ", 2 * p.half);
  GLMX_CHECK(p.theta >= 1.0 && p.theta <= 1e30, "rope_cos_sin: expected 1 <= theta <= 1e30: got ", p.theta);
  for (int64_t t = 0; host_reads(p.device) && t < p.T; ++t) {
    GLMX_CHECK(p.positions[t] >= 0 && p.positions[t] < kMaxPosition, "rope_cos_sin: expected 0 <= positions[", t, "] < 2^31: got ",
               p.positions[t]);
  }
  if (on_gpu(p.device)) return gpu::launch("rope_cos_sin", &gpu::Kernels::rope_cos_sin, p);
  select(kCosSin).fn(p);
}

void rope(const RopeParams& p) {
  GLMX_CHECK(p.half >= 0 && 2 * p.half <= p.D, "rope: expected 2 * cos.shape[1] <= x.shape[2]: got ", 2 * p.half, ", x.shape[2] is ", p.D);
  if (on_gpu(p.device)) return gpu::launch("rope", &gpu::Kernels::rope, p);
  select(kRotate).fn(p);
}

}  // namespace glmx
