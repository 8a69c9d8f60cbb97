// adamw / avx512: the body of cpu/inl/adamw.inl (which see) compiled for avx512.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace glmx::cpu::avx512 {
namespace {
#include "cpu/avx512/vec.h"
#include "cpu/inl/adamw.inl"
}  // namespace

void adamw(const AdamwParams& p) { adamw_update(p); }
}  // namespace glmx::cpu::avx512
