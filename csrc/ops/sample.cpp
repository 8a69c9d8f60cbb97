// sample: checks and kernel choice.
#include "core/check.h"
#include "core/dispatch.h"
#include "cpu/kernels.h"
#include "ops/registry.h"
#include "ops/sample_rules.h"

namespace glmx {
namespace {
using Fn = void(const SampleParams&);
constexpr Kernel<Fn> kKernels[] = {{Isa::avx512, cpu::avx512::sample}, {Isa::avx2, cpu::avx2::sample}, {Isa::base, cpu::base::sample}};
}  // namespace

OpInfo sample_info() { return op_info("sample", "", kSampleRevision, kKernels); }

void sample(const SampleParams& p) {
  check_sample_rules("sample", p.rules, p.R, p.V);
  GLMX_CHECK(p.draw >= 0 && p.draw < (int64_t{1} << 32), "sample: draw: expected 0 <= draw < 2^32: got ", p.draw);
  select(kKernels).fn(p);
}

}  // namespace glmx
