// lm_head_logprob / base: the body of cpu/inl/lm_head_logprob.inl (which see) compiled for base.
#include <emmintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace glmx::cpu::base {
namespace {
#include "cpu/base/vec.h"
#include "cpu/base/vec64.h"
#include "cpu/inl/lm_head_logprob.inl"
}  // namespace

void lm_head_scan(const LmHeadScan& p) { scan(p); }
void lm_head_finish(const LmHeadFinish& p) { finish(p); }
void lm_head_d_logits(const LmHeadDlogits& p) { d_logits(p); }
void lm_head_add(const LmHeadAdd& p) { add_parts(p); }
}  // namespace glmx::cpu::base
