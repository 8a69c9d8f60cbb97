// grouped_gemm / avx512_bf16: the body of cpu/inl/grouped_gemm.inl (which see), bf16, on words of pairs (pairs.h).
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "core/workspace.h"
#include "cpu/kernels.h"

namespace glmx::cpu::avx512_bf16 {
namespace {
#include "cpu/avx512/vec.h"

constexpr int kRows = 4, kVecs = 2;  // as avx512

#include "cpu/avx512/stored.h"
#include "cpu/avx512/transpose.h"
#include "cpu/avx512_bf16/pairs.h"
#include "cpu/avx512_bf16/stored_words.h"
#include "cpu/inl/grouped_gemm.inl"
}  // namespace

void grouped_gemm(const GroupedGemmParams& p) { p.stored.table != nullptr ? gemm_stored(p) : run(Forward<uint16_t>{p}); }
void grouped_gemm_dgrad(const GroupedGemmDgradParams& p) { run(Dgrad<uint16_t>{p}); }
void grouped_gemm_wgrad(const GroupedGemmWgradParams& p) { run(Wgrad<uint16_t>{p}); }
}  // namespace glmx::cpu::avx512_bf16
