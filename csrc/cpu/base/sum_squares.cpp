// sum_squares / base: the body of cpu/inl/sum_squares.inl (which see) compiled for base.
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
#include "cpu/inl/sum_squares.inl"
}  // namespace

void sum_squares(const SumSquaresParams& p) { sum_squares_chunks(p); }
}  // namespace glmx::cpu::base
