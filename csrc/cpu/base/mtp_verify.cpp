// mtp_verify / base: the body of cpu/inl/mtp_verify.inl (which see) compiled for base.
#include <emmintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "core/workspace.h"
#include "cpu/kernels.h"

namespace glmx::cpu::base {
namespace {
#include "cpu/base/vec.h"
#include "cpu/base/vec64.h"
#include "cpu/inl/mtp_verify.inl"
}  // namespace

void mtp_verify(const MtpVerifyParams& p) { verify_chains(p); }
}  // namespace glmx::cpu::base
