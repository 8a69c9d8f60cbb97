// route_topk: checks and kernel choice.
#include "core/check.h"
#include "core/dispatch.h"
#include "cpu/kernels.h"
#include "gpu/kernels.h"
#include "ops/registry.h"

namespace glmx {
namespace {
using Forward = void(const RouteTopkParams&);
using Backward = void(const RouteTopkBackwardParams&);
constexpr Kernel<Forward> kForward[] = {
    {Isa::avx512, cpu::avx512::route_topk}, {Isa::avx2, cpu::avx2::route_topk}, {Isa::base, cpu::base::route_topk}};
constexpr Kernel<Backward> kBackward[] = {{Isa::avx512, cpu::avx512::route_topk_backward},
                                          {Isa::avx2, cpu::avx2::route_topk_backward},
                                          {Isa::base, cpu::base::route_topk_backward}};

void check_sizes(int64_t E, int64_t K) {
  GLMX_CHECK(E >= 1 && E <= 512, "route_topk: logits: expected 1 to 512 experts: got ", E);
  GLMX_CHECK(K >= 1 && K <= E, "route_topk: top_k: expected 1 <= top_k <= ", E, " (experts): got ", K);
}
}  // namespace

OpInfo route_topk_info() { return op_info("route_topk", "", kRouteTopkRevision, kForward); }

void route_topk(const RouteTopkParams& p) {
  check_sizes(p.E, p.K);
  GLMX_CHECK(p.n_group >= 1 && p.E % p.n_group == 0, "route_topk: n_group: expected a divisor of ", p.E, " (experts): got ", p.n_group);
  GLMX_CHECK(p.topk_group >= 1 && p.topk_group <= p.n_group, "route_topk: topk_group: expected 1 <= topk_group <= ", p.n_group,
             " (n_group): got ", p.topk_group);
  GLMX_CHECK(p.K <= p.topk_group * (p.E / p.n_group), "route_topk: top_k: expected at most the ", p.topk_group * (p.E / p.n_group),
             " experts of topk_group groups: got ", p.K);
  GLMX_CHECK(p.T * p.K < INT32_MAX, "route_topk: expected T * top_k < 2^31 - 1 (counts are int32): got ", p.T, " * ", p.K);
  if (on_gpu(p.device)) return gpu::launch("route_topk", &gpu::Kernels::route_topk, p);
  select(kForward).fn(p);
}

void route_topk_backward(const RouteTopkBackwardParams& p) {
  check_sizes(p.E, p.K);
  for (int64_t i = 0; host_reads(p.device) && i < p.T * p.K; ++i) {
    GLMX_CHECK(p.topk_ids[i] >= 0 && p.topk_ids[i] < p.E, "route_topk: topk_ids: expected 0 <= id < ", p.E, ": got ", p.topk_ids[i]);
  }
  if (on_gpu(p.device)) return gpu::launch("route_topk_backward", &gpu::Kernels::route_topk_backward, p);
  select(kBackward).fn(p);
}

}  // namespace glmx
