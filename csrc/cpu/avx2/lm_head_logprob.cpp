// lm_head_logprob / avx2: the body of cpu/inl/lm_head_logprob.inl (which see) compiled for avx2.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace glmx::cpu::avx2 {
namespace {
#include "cpu/avx2/vec.h"
#include "cpu/avx2/vec64.h"
#include "cpu/inl/lm_head_logprob.inl"
}  // namespace

void lm_head_scan(const LmHeadScan& p) { scan(p); }
void lm_head_finish(const LmHeadFinish& p) { finish(p); }
void lm_head_d_logits(const LmHeadDlogits& p) { d_logits(p); }
void lm_head_add(const LmHeadAdd& p) { add_parts(p); }
}  // namespace glmx::cpu::avx2
