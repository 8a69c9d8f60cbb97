// moe_combine: checks and kernel choice.
#include "core/check.h"
#include "core/dispatch.h"
#include "cpu/kernels.h"
#include "ops/registry.h"

namespace glmx {
namespace {
using Forward = void(const MoeCombineParams&);
using Backward = void(const MoeCombineBackwardParams&);
constexpr Kernel<Forward> kForward[] = {
    {Isa::avx512, cpu::avx512::moe_combine}, {Isa::avx2, cpu::avx2::moe_combine}, {Isa::base, cpu::base::moe_combine}};
constexpr Kernel<Backward> kBackward[] = {{Isa::avx512, cpu::avx512::moe_combine_backward},
                                          {Isa::avx2, cpu::avx2::moe_combine_backward},
                                          {Isa::base, cpu::base::moe_combine_backward}};

void check_inverse(const int32_t* inverse, int64_t pairs, int64_t R, int64_t K) {
  for (int64_t i = 0; i < pairs; ++i) {
    GLMX_CHECK(inverse[i] >= -1 && inverse[i] < R, "moe_combine: inverse: expected -1 or 0 <= row < ", R, ": got ", inverse[i],
               " for token ", i / K, ", k ", i % K);
  }
}
}  // namespace

OpInfo moe_combine_info() { return op_info("moe_combine", "", kMoeCombineRevision, kForward); }

void moe_combine(const MoeCombineParams& p) {
  check_inverse(p.inverse, p.T * p.K, p.R, p.K);
  select(kForward).fn(p);
}

void moe_combine_backward(const MoeCombineBackwardParams& p) {
  check_inverse(p.inverse, p.T * p.K, p.R, p.K);
  GLMX_CHECK(p.T * p.K < INT32_MAX, "moe_combine: expected T * K < 2^31 - 1: got ", p.T, " * ", p.K);
  for (int64_t r = 0; r < p.R; ++r) p.pair_of_row[r] = -1;
  for (int64_t i = 0; i < p.T * p.K; ++i) {
    const int32_t row = p.inverse[i];
    if (row < 0) {
      if (p.d_topk_weights != nullptr) p.d_topk_weights[i] = 0.0f;
      continue;
    }
    GLMX_CHECK(p.pair_of_row[row] < 0, "moe_combine: inverse: expected each row at most once: row ", row, " is named twice");
    p.pair_of_row[row] = static_cast<int32_t>(i);
  }
  select(kBackward).fn(p);
}

}  // namespace glmx
