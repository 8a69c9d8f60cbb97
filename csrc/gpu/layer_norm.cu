// layer_norm / gpu: y[t] = (x[t] - mean[t]) * rstd[t] * weight + bias, rstd = 1 / sqrt(var + eps); backward to x, weight and bias
// Contract   include/glmx/ops.h LayerNormParams   Oracle cpu/inl/layer_norm.inl, bit for bit   Doc docs/ops/layer_norm.md
// Shapes     x, y [T,H] dtype row-major | weight, bias [H] dtype | mean, rstd [T] f32 | d_weight, d_bias [H] f32
// Layout     rows are staged in shared memory and read three times there; pieces of 16 bytes where H and the pointers allow it
// Numerics   both sums in 16 lanes, folded in one order; lanes past the row add nothing; exact sqrt and division; one rounding
// Algorithm  one block = one to eight rows, half a team for each row's sums (rms_row.h). Backward: the same for dx; then a thread sums
//            d_weight and d_bias of a piece of columns over 64 rows, and a last launch adds those blocks in order, a thread for each column
// Work/bytes 8*T*H flop; 2*T*H elements forward, 5*T*H backward (x and dy are read again for the weights): bound by memory
// Measured   ran on an H200 (docs/gpu.md), not timed there
// Limits     H >= 1; host checks in ops/layer_norm.cpp. Rows beyond 46 KB (backward: 23 KB) are not staged
#include "gpu/block_sums.h"
#include "gpu/gx/gx.h"
#include "gpu/kernels.h"
#include "gpu/rms_row.h"

namespace glmx::gpu {
namespace {

template <class T, bool kWide>
__global__ void __launch_bounds__(kNormThreads) layer_norm_rows(LayerNormParams p, NormPlan plan) {
  GX_DYNAMIC_SHARED(T, stage);
  __shared__ float shift[kHalfTeams], scale[kHalfTeams];
  const int64_t first = int64_t{blockIdx.x} * plan.rows;
  const int rows = rows_here(p.T, plan);
  const T *weight = static_cast<const T*>(p.weight), *bias = static_cast<const T*>(p.bias);
  const Rows<T> x = stage_rows<kWide>(stage, static_cast<const T*>(p.x) + first * p.H, rows, plan);
  finish_stage();
  each_row(rows, [&](int r, bool write) {
    const T* row = x.row(r);
    float sum = 0.0f, squares = 0.0f;
    each_link(plan.H, [&](int i, bool inside) { sum = sum + load_link(row, i, inside); });
    const float mean = gx::fold_add(sum) / static_cast<float>(plan.H);
    each_link(plan.H, [&](int i, bool inside) {
      const float a = load_link(row, i, inside, mean) - mean;
      squares = gx::fma(a, a, squares);
    });
    const float rstd = reciprocal_root(gx::fold_add(squares) / static_cast<float>(plan.H) + p.eps);
    if (!write) return;
    shift[r] = mean;
    scale[r] = rstd;
    if (p.mean != nullptr) p.mean[first + r] = mean;
    if (p.rstd != nullptr) p.rstd[first + r] = rstd;
  });
  gx::barrier();
  T* y = static_cast<T*>(p.y) + first * p.H;
  each_piece<T>(rows, plan.H, [&](int r, int i, int n) {
    Piece<T> a = load_piece<kWide>(x.row(r) + i, n);
    const Piece<T> w = load_piece<kWide>(weight + i, n), b = load_piece<kWide>(bias + i, n);
#pragma unroll
    for (int j = 0; j < kPiece<T>; ++j) a.v[j] = gx::fma((a.v[j] - shift[r]) * scale[r], w.v[j], b.v[j]);
    store_piece<kWide>(y + int64_t{r} * plan.H + i, a, n);
  });
}

// With g = dy * weight and n = (x - mean) * rstd:  dx = rstd * (g - mean(g) - n * mean(g * n)),  d_weight += dy * n,  d_bias += dy.
template <class T, bool kWide>
__global__ void __launch_bounds__(kNormThreads) layer_norm_backward_rows(LayerNormBackwardParams p, NormPlan plan) {
  GX_DYNAMIC_SHARED(T, stage);
  __shared__ float mean_g[kHalfTeams], mean_gn[kHalfTeams];
  const int64_t first = int64_t{blockIdx.x} * plan.rows;
  const int rows = rows_here(p.T, plan);
  const T* weight = static_cast<const T*>(p.weight);
  const Rows<T> x = stage_rows<kWide>(stage, static_cast<const T*>(p.x) + first * p.H, rows, plan);
  const Rows<T> dy = stage_rows<kWide>(stage + plan.rows * x.stride, static_cast<const T*>(p.dy) + first * p.H, rows, plan);
  finish_stage();
  each_row(rows, [&](int r, bool write) {
    const T *x_row = x.row(r), *dy_row = dy.row(r);
    const float mean = p.mean[first + r], rstd = p.rstd[first + r];
    float sum_g = 0.0f, sum_gn = 0.0f;
    each_link(plan.H, [&](int i, bool inside) {
      const float normed = (load_link(x_row, i, inside, mean) - mean) * rstd;
      const float g = load_link(dy_row, i, inside) * load_link(weight, i, inside);
      sum_g = sum_g + g;
      sum_gn = gx::fma(g, normed, sum_gn);
    });
    sum_g = gx::fold_add(sum_g) / static_cast<float>(plan.H);
    sum_gn = gx::fold_add(sum_gn) / static_cast<float>(plan.H);
    if (!write) return;
    mean_g[r] = sum_g;
    mean_gn[r] = sum_gn;
  });
  gx::barrier();
  T* dx = static_cast<T*>(p.dx) + first * p.H;
  each_piece<T>(rows, plan.H, [&](int r, int i, int n) {
    const float mean = p.mean[first + r], rstd = p.rstd[first + r];
    const Piece<T> a = load_piece<kWide>(x.row(r) + i, n), w = load_piece<kWide>(weight + i, n);
    Piece<T> grad = load_piece<kWide>(dy.row(r) + i, n);
#pragma unroll
    for (int j = 0; j < kPiece<T>; ++j) {
      const float normed = (a.v[j] - mean) * rstd;
      grad.v[j] = rstd * ((grad.v[j] * w.v[j] - mean_g[r]) - normed * mean_gn[r]);
    }
    store_piece<kWide>(dx + int64_t{r} * plan.H + i, grad, n);
  });
}

// partial[block] = sums of dy * n, then of dy, over the block's 64 rows in order, for this thread's piece of columns.
template <class T, bool kWide>
__global__ void __launch_bounds__(kSumThreads) layer_norm_columns(LayerNormBackwardParams p) {
  const int64_t i = (int64_t{blockIdx.y} * kSumThreads + threadIdx.x) * kPiece<T>;
  if (i >= p.H) return;
  const int n = p.H - i < kPiece<T> ? static_cast<int>(p.H - i) : kPiece<T>;
  const int64_t begin = int64_t{blockIdx.x} * kNormRows, end = begin + kNormRows < p.T ? begin + kNormRows : p.T;
  const T *x = static_cast<const T*>(p.x) + i, *dy = static_cast<const T*>(p.dy) + i;
  float weight[kPiece<T>] = {}, bias[kPiece<T>] = {};
  each_row_down<kWide>(x, dy, p.H, begin, end, n, [&](int64_t t, const Piece<T>& a, const Piece<T>& grad) {
    const float mean = p.mean[t], rstd = p.rstd[t];
#pragma unroll
    for (int j = 0; j < kPiece<T>; ++j) {
      weight[j] = gx::fma(grad.v[j], (a.v[j] - mean) * rstd, weight[j]);
      bias[j] = bias[j] + grad.v[j];
    }
  });
  float* partial = p.partial + blockIdx.x * 2 * p.H + i;
#pragma unroll
  for (int j = 0; j < kPiece<T>; ++j) {
    if (j >= n) break;
    partial[j] = weight[j];
    partial[p.H + j] = bias[j];
  }
}

template <class T, bool kWide>
void forward(const LayerNormParams& p) {
  const NormPlan plan = plan_rows<T>("layer_norm", p.T, p.H, 1);
  gx::launch("layer_norm", layer_norm_rows<T, kWide>, plan.grid, kNormThreads, plan.shared, p.device, p, plan);
}

template <class T, bool kWide>
void backward(const LayerNormBackwardParams& p) {
  constexpr const char* kName = "layer_norm_backward";
  const NormPlan plan = plan_rows<T>(kName, p.T, p.H, 2);
  gx::launch(kName, layer_norm_backward_rows<T, kWide>, plan.grid, kNormThreads, plan.shared, p.device, p, plan);
  const int64_t blocks = pieces_of(p.T, kNormRows);
  const dim3 columns(static_cast<unsigned>(blocks), static_cast<unsigned>(pieces_of(p.H, kSumThreads * kPiece<T>)));
  gx::launch(kName, layer_norm_columns<T, kWide>, columns, kSumThreads, 0, p.device, p);
  const BlockSums sums{p.partial, blocks, 2 * p.H, p.H, {p.d_weight, p.d_bias}, {p.accumulate_weight, p.accumulate_bias}};
  gx::launch(kName, sum_blocks, dim3(static_cast<unsigned>(pieces_of(p.H, kSumThreads)), 2), kSumThreads, 0, p.device, sums);
}

}  // namespace

void layer_norm(const LayerNormParams& p) {
  const bool wide = wide_rows(p.H * dtype_size(p.dtype), p.x, p.weight, p.bias, p.y);
  pick_rows(p.dtype, wide, [&](auto type, auto is_wide) { forward<decltype(type), is_wide>(p); });
}
void layer_norm_backward(const LayerNormBackwardParams& p) {
  const bool wide = wide_rows(p.H * dtype_size(p.dtype), p.x, p.dy, p.weight, p.dx);
  pick_rows(p.dtype, wide, [&](auto type, auto is_wide) { backward<decltype(type), is_wide>(p); });
}

}  // namespace glmx::gpu
