// embedding / base: the body of cpu/inl/embedding.inl (which see) compiled for base.
#include <emmintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace glmx::cpu::base {
namespace {
#include "cpu/base/vec.h"
#include "cpu/inl/embedding.inl"
}  // namespace

void embedding(const EmbeddingParams& p) { embedding_forward(p); }
void embedding_backward(const EmbeddingBackwardParams& p) { embedding_backward_rows(p); }
}  // namespace glmx::cpu::base
