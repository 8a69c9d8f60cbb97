// expert_plan / base: a stable counting sort of (token, k) pairs by expert
// Contract   include/glmx/ops.h ExpertPlanParams   Oracle reference/expert_plan.py   Doc docs/ops/expert_plan.md
// Shapes     topk_ids, inverse [T,K] i32 | expert_offsets [E+1] i32 | row_token [T*K] i32
// Layout     row-major; a pair is i = t * K + k
// Numerics   integers only; the result does not depend on how the work is split
// Algorithm  count into offsets[e + 1], prefix sum, then walk the pairs in order with offsets[e] as the cursor of expert e:
//            it ends where expert e + 1 begins, so one shift by an element restores the offsets and no scratch is needed
// Work/bytes 2*T*K reads, 2*T*K writes; bound by latency of the counters (about 2 ns a pair), far below the GEMMs it prepares
// Measured   one core of an AMD EPYC (Zen 4), T = 4096: 9 ns a token at E = 32, K = 4; 15 ns at E = 128, K = 8
// Limits     one thread; plain scalar code, so base is the only kernel; ids are checked in the counting pass
#include <cstdint>

#include "cpu/kernels.h"

namespace glmx::cpu::base {

int64_t expert_plan(const ExpertPlanParams& p) {
  const int64_t pairs = p.T * p.K;
  int32_t* const offsets = p.expert_offsets;
  for (int64_t e = 0; e <= p.E; ++e) offsets[e] = 0;
  for (int64_t i = 0; i < pairs; ++i) {
    const int32_t e = p.topk_ids[i];
    if (e < -1 || e >= p.E) return i;
    if (e >= 0) ++offsets[e + 1];
  }
  for (int64_t e = 0; e < p.E; ++e) offsets[e + 1] += offsets[e];
  const int32_t rows = offsets[p.E];

  const int32_t* id = p.topk_ids;
  int32_t* inverse = p.inverse;
  for (int64_t t = 0; t < p.T; ++t) {
    for (int64_t k = 0; k < p.K; ++k) {
      const int32_t e = *id++;
      const int32_t row = e < 0 ? -1 : offsets[e]++;
      if (e >= 0) p.row_token[row] = static_cast<int32_t>(t);
      *inverse++ = row;
    }
  }
  for (int64_t r = rows; r < pairs; ++r) p.row_token[r] = -1;
  for (int64_t e = p.E; e > 0; --e) offsets[e] = offsets[e - 1];
  offsets[0] = 0;
  return -1;
}

}  // namespace glmx::cpu::base
