// sample / base: the body of cpu/inl/sample.inl (which see) compiled for base.
#include <emmintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "core/workspace.h"
#include "cpu/kernels.h"

namespace glmx::cpu::base {
namespace {
#include "cpu/base/vec.h"
#include "cpu/base/vec64.h"
#include "cpu/inl/sample.inl"
}  // namespace

void sample(const SampleParams& p) { sample_rows(p); }
}  // namespace glmx::cpu::base
