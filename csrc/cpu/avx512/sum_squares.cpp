// sum_squares / avx512: the body of cpu/inl/sum_squares.inl (which see) compiled for avx512.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace glmx::cpu::avx512 {
namespace {
#include "cpu/avx512/vec.h"
#include "cpu/avx512/vec64.h"
#include "cpu/inl/sum_squares.inl"
}  // namespace

void sum_squares(const SumSquaresParams& p) { sum_squares_chunks(p); }
}  // namespace glmx::cpu::avx512
