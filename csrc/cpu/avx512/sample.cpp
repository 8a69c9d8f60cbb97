// sample / avx512: the body of cpu/inl/sample.inl (which see) compiled for avx512.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "core/workspace.h"
#include "cpu/kernels.h"

namespace glmx::cpu::avx512 {
namespace {
#include "cpu/avx512/vec.h"
#include "cpu/avx512/vec64.h"
#include "cpu/inl/sample.inl"
}  // namespace

void sample(const SampleParams& p) { sample_rows(p); }
}  // namespace glmx::cpu::avx512
