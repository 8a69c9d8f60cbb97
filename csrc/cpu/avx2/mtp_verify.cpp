// mtp_verify / avx2: the body of cpu/inl/mtp_verify.inl (which see) compiled for avx2.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "core/workspace.h"
#include "cpu/kernels.h"

namespace glmx::cpu::avx2 {
namespace {
#include "cpu/avx2/vec.h"
#include "cpu/avx2/vec64.h"
#include "cpu/inl/mtp_verify.inl"
}  // namespace

void mtp_verify(const MtpVerifyParams& p) { verify_chains(p); }
}  // namespace glmx::cpu::avx2
