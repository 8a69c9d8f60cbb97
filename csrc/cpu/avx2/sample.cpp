// sample / avx2: the body of cpu/inl/sample.inl (which see) compiled for avx2.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "core/workspace.h"
#include "cpu/kernels.h"

namespace glmx::cpu::avx2 {
namespace {
#include "cpu/avx2/vec.h"
#include "cpu/avx2/vec64.h"
#include "cpu/inl/sample.inl"
}  // namespace

void sample(const SampleParams& p) { sample_rows(p); }
}  // namespace glmx::cpu::avx2
