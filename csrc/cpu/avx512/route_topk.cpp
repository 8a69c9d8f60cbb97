// route_topk / avx512: the body of cpu/inl/route_topk.inl (which see) compiled for avx512.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace glmx::cpu::avx512 {
namespace {
#include "cpu/avx512/vec.h"
#include "cpu/inl/route_topk.inl"
}  // namespace

void route_topk(const RouteTopkParams& p) { route_topk_forward(p); }
void route_topk_backward(const RouteTopkBackwardParams& p) { route_topk_backward_tokens(p); }
}  // namespace glmx::cpu::avx512
