// adamw / base: the body of cpu/inl/adamw.inl (which see) compiled for base.
#include <emmintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace glmx::cpu::base {
namespace {
#include "cpu/base/vec.h"
#include "cpu/inl/adamw.inl"
}  // namespace

void adamw(const AdamwParams& p) { adamw_update(p); }
}  // namespace glmx::cpu::base
