// add_rms_norm / avx2: the body of cpu/inl/add_rms_norm.inl (which see) compiled for avx2.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace glmx::cpu::avx2 {
namespace {
#include "cpu/avx2/vec.h"
#include "cpu/inl/add_rms_norm.inl"
}  // namespace

void add_rms_norm(const AddRmsNormParams& p) { add_rms_norm_rows(p); }
}  // namespace glmx::cpu::avx2
