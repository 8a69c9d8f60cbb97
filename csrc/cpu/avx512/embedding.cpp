// embedding / avx512: the body of cpu/inl/embedding.inl (which see) compiled for avx512.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace glmx::cpu::avx512 {
namespace {
#include "cpu/avx512/vec.h"
#include "cpu/inl/embedding.inl"
}  // namespace

void embedding(const EmbeddingParams& p) { embedding_forward(p); }
void embedding_backward(const EmbeddingBackwardParams& p) { embedding_backward_rows(p); }
}  // namespace glmx::cpu::avx512
