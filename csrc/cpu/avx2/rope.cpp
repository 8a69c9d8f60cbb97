// rope / avx2: the body of cpu/inl/rope.inl (which see) compiled for avx2.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace glmx::cpu::avx2 {
namespace {
#include "cpu/avx2/vec.h"
#include "cpu/avx2/vec64.h"
#include "cpu/inl/rope.inl"
}  // namespace

void rope_cos_sin(const RopeCosSinParams& p) { rope_cos_sin_rows(p); }
void rope(const RopeParams& p) { rope_rows(p); }
}  // namespace glmx::cpu::avx2
