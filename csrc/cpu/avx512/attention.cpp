// attention / avx512: the body of cpu/inl/attention.inl (which see) compiled for avx512.
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

constexpr int kRows = 4, kVecs = 2;  // 16 accumulators, 2 of the panel, 1 broadcast

#include "cpu/avx512/transpose.h"
#include "cpu/inl/attention.inl"
}  // namespace

void attention(const AttentionParams& p) { attention_forward(p); }
void attention_backward(const AttentionBackwardParams& p) { attention_gradients(p); }
}  // namespace glmx::cpu::avx512
