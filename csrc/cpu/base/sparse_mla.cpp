// sparse_mla / base: the body of cpu/inl/sparse_mla.inl (which see) compiled for base.
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

constexpr int kRows = 4, kVecs = 1;  // sixteen lanes are an array here: the size bounds nothing

#include "cpu/base/transpose.h"
#include "cpu/inl/sparse_mla.inl"
}  // namespace

void sparse_mla(const SparseMlaParams& p) { mla_forward(p); }
void sparse_mla_backward(const SparseMlaBackwardParams& p) { mla_backward(p); }
}  // namespace glmx::cpu::base
