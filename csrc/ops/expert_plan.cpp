// expert_plan: checks and kernel choice.
#include "core/check.h"
#include "core/dispatch.h"
#include "cpu/kernels.h"
#include "gpu/kernels.h"
#include "ops/registry.h"

namespace glmx {
namespace {
// Returns the index of the first pair whose id is out of range, or -1.
using Plan = int64_t(const ExpertPlanParams&);
constexpr Kernel<Plan> kPlan[] = {{Isa::base, cpu::base::expert_plan}};

void check_id(const ExpertPlanParams& p, int64_t i) {
  const int32_t id = p.topk_ids[i];
  GLMX_CHECK(id >= -1 && id < p.E, "expert_plan: topk_ids: expected -1 or 0 <= id < ", p.E, ": got ", id, " for token ", i / p.K, ", k ",
             i % p.K);
}
}  // namespace

OpInfo expert_plan_info() { return op_info("expert_plan", "", kExpertPlanRevision, kPlan); }

void expert_plan(const ExpertPlanParams& p) {
  GLMX_CHECK(p.E >= 1, "expert_plan: expected num_experts >= 1: got ", p.E);
  GLMX_CHECK(p.T * p.K < INT32_MAX, "expert_plan: expected T * K < 2^31 - 1: got ", p.T, " * ", p.K);
  if (on_gpu(p.device)) {
    for (int64_t i = 0; host_reads(p.device) && i < p.T * p.K; ++i) check_id(p, i);
    return gpu::launch("expert_plan", &gpu::Kernels::expert_plan, p);
  }
  const int64_t bad = select(kPlan).fn(p);
  if (bad >= 0) check_id(p, bad);
}

}  // namespace glmx
