// sum_squares / avx2: the body of cpu/inl/sum_squares.inl (which see) compiled for avx2.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace glmx::cpu::avx2 {
namespace {
#include "cpu/avx2/vec.h"
#include "cpu/avx2/vec64.h"
#include "cpu/inl/sum_squares.inl"
}  // namespace

void sum_squares(const SumSquaresParams& p) { sum_squares_chunks(p); }
}  // namespace glmx::cpu::avx2
