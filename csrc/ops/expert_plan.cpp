// expert_plan: checks and kernel choice.
#include "core/check.h"
#include "core/dispatch.h"
#include "cpu/kernels.h"
#include "ops/registry.h"

namespace glmx {
namespace {
// Returns the index of the first pair whose id is out of range, or -1.
using Plan = int64_t(const ExpertPlanParams&);
constexpr Kernel<Plan> kPlan[] = {{Isa::base, cpu::base::expert_plan}};
}  // namespace

OpInfo expert_plan_info() { return op_info("expert_plan", "", kExpertPlanRevision, kPlan); }

void expert_plan(const ExpertPlanParams& p) {
  GLMX_CHECK(p.E >= 1, "expert_plan: expected num_experts >= 1: got ", p.E);
  GLMX_CHECK(p.T * p.K < INT32_MAX, "expert_plan: expected T * K < 2^31 - 1: got ", p.T, " * ", p.K);
  const int64_t bad = select(kPlan).fn(p);
  GLMX_CHECK(bad < 0, "expert_plan: topk_ids: expected -1 or 0 <= id < ", p.E, ": got ", p.topk_ids[bad], " for token ", bad / p.K, ", k ",
             bad % p.K);
}

}  // namespace glmx
