// adamw / avx2: the body of cpu/inl/adamw.inl (which see) compiled for avx2.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace glmx::cpu::avx2 {
namespace {
#include "cpu/avx2/vec.h"
#include "cpu/inl/adamw.inl"
}  // namespace

void adamw(const AdamwParams& p) { adamw_update(p); }
}  // namespace glmx::cpu::avx2
