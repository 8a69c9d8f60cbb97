// attention / base: the body of cpu/inl/attention.inl (which see) compiled for base.
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
#include "cpu/inl/attention.inl"
}  // namespace

void attention(const AttentionParams& p) { attention_forward(p); }
void attention_backward(const AttentionBackwardParams& p) { attention_gradients(p); }
}  // namespace glmx::cpu::base
