// sparse_mla / avx512_bf16: the body of cpu/inl/sparse_mla.inl (which see), bf16, on words of pairs (pairs.h).
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "core/workspace.h"
#include "cpu/kernels.h"

namespace glmx::cpu::avx512_bf16 {
namespace {
#include "cpu/avx512/vec.h"
#include "cpu/avx512/vec64.h"

constexpr int kRows = 4, kVecs = 2;  // as avx512

#include "cpu/avx512/transpose.h"
#include "cpu/avx512_bf16/pairs.h"
#include "cpu/inl/sparse_mla.inl"

#include "cpu/avx512_bf16/pair_weights.h"
}  // namespace

void sparse_mla(const SparseMlaParams& p) { mla_forward_of<VectorUnit<uint16_t>>(p); }
void sparse_mla_backward(const SparseMlaBackwardParams& p) { mla_backward_of<VectorUnit<uint16_t>>(p); }
}  // namespace glmx::cpu::avx512_bf16
