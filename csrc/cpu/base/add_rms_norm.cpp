// add_rms_norm / base: the body of cpu/inl/add_rms_norm.inl (which see) compiled for base.
#include <emmintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace glmx::cpu::base {
namespace {
#include "cpu/base/vec.h"
#include "cpu/inl/add_rms_norm.inl"
}  // namespace

void add_rms_norm(const AddRmsNormParams& p) { add_rms_norm_rows(p); }
}  // namespace glmx::cpu::base
