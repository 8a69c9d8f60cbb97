// Weight gradients of the normalisations: blocks of 64 rows are summed first, each into its part of a workspace; then blocks in order.
#pragma once
#include "gpu/gx/gx.h"
#include "gpu/rows.h"

namespace glmx::gpu {
namespace {

constexpr int64_t kNormRows = 64;  // rows of a block: part of the bits

// f(row, x, dy) for one piece of columns of the rows [begin, end) in order, n elements of rows of H. The loads of kAhead rows come first,
// so that they are in flight together; past the end they are the first row's again.
template <bool kWide, class T, class F>
__device__ inline void each_row_down(const T* x, const T* dy, int64_t H, int64_t begin, int64_t end, int n, F f) {
  constexpr int kAhead = 4;
  for (int64_t t = begin; t < end; t += kAhead) {
    Piece<T> a[kAhead], grad[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t row = t + k < end ? t + k : t;
      a[k] = load_piece<kWide>(x + row * H, n);
      grad[k] = load_piece<kWide>(dy + row * H, n);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (t + k < end) f(t + k, a[k], grad[k]);
    }
  }
}

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
