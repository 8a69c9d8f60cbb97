// mtp_verify: checks and kernel choice.
#include "core/check.h"
#include "core/dispatch.h"
#include "cpu/kernels.h"
#include "ops/registry.h"
#include "ops/sample_rules.h"

namespace glmx {
namespace {
using Fn = void(const MtpVerifyParams&);
constexpr Kernel<Fn> kKernels[] = {
    {Isa::avx512, cpu::avx512::mtp_verify}, {Isa::avx2, cpu::avx2::mtp_verify}, {Isa::base, cpu::base::mtp_verify}};
}  // namespace

OpInfo mtp_verify_info() { return op_info("mtp_verify", "", kMtpVerifyRevision, kKernels); }

void mtp_verify(const MtpVerifyParams& p) {
  GLMX_CHECK(p.R < (int64_t{1} << 31), "mtp_verify: logits: expected fewer than 2^31 rows: got ", p.R);
  check_sample_rules("mtp_verify", p.rules, p.R, p.V);
  const int64_t width = p.row_offsets == nullptr ? p.K : 1, drafts = p.row_offsets == nullptr ? p.B * p.K : p.R;
  for (int64_t i = 0; i < drafts; ++i) {
    GLMX_CHECK(p.draft_ids[i] >= -1 && p.draft_ids[i] < p.V, "mtp_verify: draft_ids: expected ids in [0, ", p.V, ") or -1: got ",
               p.draft_ids[i], " at [", i / width, ", ", i % width, "]");
  }
  if (p.row_offsets != nullptr) {
    GLMX_CHECK(p.row_offsets[0] == 0 && p.row_offsets[p.B] == p.R, "mtp_verify: row_offsets: expected offsets from 0 to ", p.R, ": got ",
               p.row_offsets[0], " to ", p.row_offsets[p.B]);
    for (int64_t b = 0; b < p.B; ++b) {
      GLMX_CHECK(p.row_offsets[b] < p.row_offsets[b + 1], "mtp_verify: row_offsets: expected a row of each sequence: got ",
                 p.row_offsets[b], " and ", p.row_offsets[b + 1], " at ", b);
    }
  }
  GLMX_CHECK(p.mode >= VerifyMode::greedy && p.mode <= VerifyMode::rejection,
             "mtp_verify: mode: expected 0 (greedy), 1 (sample) or 2 (rejection): got ", static_cast<int64_t>(p.mode));
  GLMX_CHECK(p.draft_probs == nullptr || p.mode == VerifyMode::rejection,
             "mtp_verify: draft_probs: expected none but with mode rejection: got some");
  select(kKernels).fn(p);
}

}  // namespace glmx
