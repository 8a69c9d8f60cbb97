// rope / base: the body of cpu/inl/rope.inl (which see) compiled for base.
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
#include "cpu/inl/rope.inl"
}  // namespace

void rope_cos_sin(const RopeCosSinParams& p) { rope_cos_sin_rows(p); }
void rope(const RopeParams& p) { rope_rows(p); }
}  // namespace glmx::cpu::base
