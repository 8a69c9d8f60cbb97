// rms_norm / gpu: y[t] = weight * round(x[t] * rstd[t]), rstd = 1 / sqrt(mean(x^2) + eps); backward to x and weight
// Contract   include/glmx/ops.h RmsNormParams   Oracle cpu/inl/rms_norm.inl, bit for bit   Doc docs/ops/rms_norm.md
// Shapes     x, y [T,H] dtype row-major | weight [H] dtype | rstd [T] f32 | d_weight [H] f32
// Layout     rows are staged in shared memory and read twice there; pieces of 16 bytes where H and the pointers allow it
// Numerics   sum of squares in 16 lanes, folded in one order; exact sqrt and division; rounded to dtype before and after the weight
// Algorithm  one block = one to eight rows, half a team for each row's sum (rms_row.h). Backward: the same for dx; then a thread sums
//            d_weight of a piece of columns over 64 rows, and a last launch adds those blocks in order, a thread for each column
// Work/bytes 4*T*H flop; 2*T*H elements forward, 5*T*H backward (x and dy are read again for d_weight): bound by memory
// Measured   H200, bf16: 3.2 TB/s for 8192 rows, 75 % of a copy; one row of 4096 takes 4.9 us, its chain of 256 additions
// Limits     H >= 1; host checks in ops/rms_norm.cpp. Rows beyond 46 KB (backward: 23 KB) are not staged
#include "gpu/block_sums.h"
#include "gpu/gx/gx.h"
#include "gpu/kernels.h"
#include "gpu/rms_row.h"

namespace glmx::gpu {
namespace {

template <class T, bool kWide>
__global__ void __launch_bounds__(kNormThreads) rms_norm_rows(RmsNormParams p, NormPlan plan) {
  GX_DYNAMIC_SHARED(T, stage);
  const int64_t first = int64_t{blockIdx.x} * plan.rows;
  const int rows = rows_here(p.T, plan);
  const Rows<T> x = stage_rows<kWide>(stage, static_cast<const T*>(p.x) + first * p.H, rows, plan);
  finish_stage();
  float* rstd = p.rstd == nullptr ? nullptr : p.rstd + first;
  normalise_rows<kWide>(x, static_cast<const T*>(p.weight), static_cast<T*>(p.y) + first * p.H, rstd, rows, p.eps, plan);
}

// With g = dy * weight and n = x * rstd:  dx = rstd * (g - n * mean(g * n)),  d_weight += dy * n.
template <class T, bool kWide>
__global__ void __launch_bounds__(kNormThreads) rms_norm_backward_rows(RmsNormBackwardParams p, NormPlan plan) {
  GX_DYNAMIC_SHARED(T, stage);
  __shared__ float mean[kHalfTeams];
  const int64_t first = int64_t{blockIdx.x} * plan.rows;
  const int rows = rows_here(p.T, plan);
  const T* weight = static_cast<const T*>(p.weight);
  const Rows<T> x = stage_rows<kWide>(stage, static_cast<const T*>(p.x) + first * p.H, rows, plan);
  const Rows<T> dy = stage_rows<kWide>(stage + plan.rows * x.stride, static_cast<const T*>(p.dy) + first * p.H, rows, plan);
  finish_stage();
  each_row(rows, [&](int r, bool write) {
    const T *x_row = x.row(r), *dy_row = dy.row(r);
    const float rstd = p.rstd[first + r];
    float sum = 0.0f;
    each_link(plan.H, [&](int i, bool inside) {
      const float normed = load_link(x_row, i, inside) * rstd;
      sum = gx::fma(load_link(dy_row, i, inside) * load_link(weight, i, inside), normed, sum);
    });
    const float folded = gx::fold_add(sum) / static_cast<float>(plan.H);
    if (write) mean[r] = folded;
  });
  gx::barrier();
  T* dx = static_cast<T*>(p.dx) + first * p.H;
  each_piece<T>(rows, plan.H, [&](int r, int i, int n) {
    const float rstd = p.rstd[first + r];
    const Piece<T> a = load_piece<kWide>(x.row(r) + i, n), w = load_piece<kWide>(weight + i, n);
    Piece<T> grad = load_piece<kWide>(dy.row(r) + i, n);
#pragma unroll
    for (int j = 0; j < kPiece<T>; ++j) grad.v[j] = rstd * (grad.v[j] * w.v[j] - (a.v[j] * rstd) * mean[r]);
    store_piece<kWide>(dx + int64_t{r} * plan.H + i, grad, n);
  });
}

// partial[block] = sum of dy * round(x * rstd) over the block's 64 rows in order, for this thread's piece of columns.
template <class T, bool kWide>
__global__ void __launch_bounds__(kSumThreads) rms_norm_columns(RmsNormBackwardParams p) {
  const int64_t i = (int64_t{blockIdx.y} * kSumThreads + threadIdx.x) * kPiece<T>;
  if (i >= p.H) return;
  const int n = p.H - i < kPiece<T> ? static_cast<int>(p.H - i) : kPiece<T>;
  const int64_t begin = int64_t{blockIdx.x} * kNormRows, end = begin + kNormRows < p.T ? begin + kNormRows : p.T;
  const T *x = static_cast<const T*>(p.x) + i, *dy = static_cast<const T*>(p.dy) + i;
  float sum[kPiece<T>] = {};
  each_row_down<kWide>(x, dy, p.H, begin, end, n, [&](int64_t t, const Piece<T>& a, const Piece<T>& grad) {
    const float rstd = p.rstd[t];
#pragma unroll
    for (int j = 0; j < kPiece<T>; ++j) sum[j] = gx::fma(grad.v[j], gx::round_to<T>(a.v[j] * rstd), sum[j]);
  });
  float* partial = p.partial + blockIdx.x * p.H + i;
#pragma unroll
  for (int j = 0; j < kPiece<T>; ++j) {
    if (j < n) partial[j] = sum[j];
  }
}

template <class T, bool kWide>
void forward(const RmsNormParams& p) {
  const NormPlan plan = plan_rows<T>("rms_norm", p.T, p.H, 1);
  gx::launch("rms_norm", rms_norm_rows<T, kWide>, plan.grid, kNormThreads, plan.shared, p.device, p, plan);
}

template <class T, bool kWide>
void backward(const RmsNormBackwardParams& p) {
  constexpr const char* kName = "rms_norm_backward";
  const NormPlan plan = plan_rows<T>(kName, p.T, p.H, 2);
  gx::launch(kName, rms_norm_backward_rows<T, kWide>, plan.grid, kNormThreads, plan.shared, p.device, p, plan);
  const int64_t blocks = pieces_of(p.T, kNormRows);
  const dim3 columns(static_cast<unsigned>(blocks), static_cast<unsigned>(pieces_of(p.H, kSumThreads * kPiece<T>)));
  gx::launch(kName, rms_norm_columns<T, kWide>, columns, kSumThreads, 0, p.device, p);
  const BlockSums sums{p.partial, blocks, p.H, p.H, {p.d_weight, nullptr}, {p.accumulate, false}};
  gx::launch(kName, sum_blocks, dim3(static_cast<unsigned>(pieces_of(p.H, kSumThreads))), kSumThreads, 0, p.device, sums);
}

}  // namespace

void rms_norm(const RmsNormParams& p) {
  const bool wide = wide_rows(p.H * dtype_size(p.dtype), p.x, p.weight, p.y);
  pick_rows(p.dtype, wide, [&](auto type, auto is_wide) { forward<decltype(type), is_wide>(p); });
}
void rms_norm_backward(const RmsNormBackwardParams& p) {
  const bool wide = wide_rows(p.H * dtype_size(p.dtype), p.x, p.dy, p.weight, p.dx);
  pick_rows(p.dtype, wide, [&](auto type, auto is_wide) { backward<decltype(type), is_wide>(p); });
}

}  // namespace glmx::gpu
