// moe_combine: checks and kernel choice.
#include <vector>

#include "core/check.h"
#include "core/dispatch.h"
#include "cpu/kernels.h"
#include "gpu/kernels.h"
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

void fail_named_twice(int32_t row) { detail::fail("moe_combine: inverse: expected each row at most once: row ", row, " is named twice"); }

// The kernels of a GPU fill pair_of_row themselves, so this check leaves it alone.
void check_rows_once(const int32_t* inverse, int64_t pairs, int64_t R) {
  std::vector<bool> named(static_cast<size_t>(R));
  for (int64_t i = 0; i < pairs; ++i) {
    if (inverse[i] < 0) continue;
    if (named[inverse[i]]) fail_named_twice(inverse[i]);
    named[inverse[i]] = true;
  }
}

// pair_of_row, and the zeros of the pairs that name no row.
void fill_pairs(const MoeCombineBackwardParams& p) {
  for (int64_t r = 0; r < p.R; ++r) p.pair_of_row[r] = -1;
  for (int64_t i = 0; i < p.T * p.K; ++i) {
    const int32_t row = p.inverse[i];
    if (row < 0) {
      if (p.d_topk_weights != nullptr) p.d_topk_weights[i] = 0.0f;
      continue;
    }
    if (p.pair_of_row[row] >= 0) fail_named_twice(row);
    p.pair_of_row[row] = static_cast<int32_t>(i);
  }
}
}  // namespace

OpInfo moe_combine_info() { return op_info("moe_combine", "", kMoeCombineRevision, kForward); }

void moe_combine(const MoeCombineParams& p) {
  if (host_reads(p.device)) check_inverse(p.inverse, p.T * p.K, p.R, p.K);
  if (on_gpu(p.device)) return gpu::launch("moe_combine", &gpu::Kernels::moe_combine, p);
  select(kForward).fn(p);
}

void moe_combine_backward(const MoeCombineBackwardParams& p) {
  GLMX_CHECK(p.T * p.K < INT32_MAX, "moe_combine: expected T * K < 2^31 - 1: got ", p.T, " * ", p.K);
  if (host_reads(p.device)) check_inverse(p.inverse, p.T * p.K, p.R, p.K);
  if (on_gpu(p.device)) {
    if (host_reads(p.device)) check_rows_once(p.inverse, p.T * p.K, p.R);
    return gpu::launch("moe_combine_backward", &gpu::Kernels::moe_combine_backward, p);
  }
  fill_pairs(p);
  select(kBackward).fn(p);
}

}  // namespace glmx
