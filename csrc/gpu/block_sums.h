// Weight gradients of the normalisations: blocks of 64 rows are summed first, each into its part of a workspace; then blocks in order.
#pragma once
#include "gpu/gx/gx.h"

namespace glmx::gpu {
namespace {

constexpr int64_t kNormRows = 64;  // rows of a block: part of the bits

// out[i] = the sum of partial[b * stride + i] over the blocks in order; blockIdx.y picks one of two gradients that lie side by side.
struct BlockSums {
  const float* partial;
  int64_t blocks, stride, H;
  float* out[2];
  bool accumulate[2];
};
constexpr int kSumThreads = 64;  // few: columns are all the parallelism that there is
__global__ void __launch_bounds__(kSumThreads) sum_blocks(BlockSums p) {
  const int64_t i = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  if (i >= p.H) return;
  const int which = static_cast<int>(blockIdx.y);
  const float* partial = p.partial + which * p.H + i;
  float sum = 0.0f;
#pragma unroll 16
  for (int64_t b = 0; b < p.blocks; ++b) sum = sum + partial[b * p.stride];
  float* out = (which == 0 ? p.out[0] : p.out[1]) + i;
  *out = (which == 0 ? p.accumulate[0] : p.accumulate[1]) ? *out + sum : sum;
}

}  // namespace
}  // namespace glmx::gpu
