// add_rms_norm / gpu: residual_out[t] = round(residual[t] + x[t]), y[t] = rms_norm(residual_out[t])
// Contract   include/glmx/ops.h AddRmsNormParams   Oracle cpu/inl/add_rms_norm.inl, bit for bit   Doc docs/ops/add_rms_norm.md
// Shapes     x, residual, residual_out, y [T,H] dtype row-major | weight [H] dtype | rstd [T] f32
// Layout     the sum is written to memory and staged in shared memory, where the normalisation reads it; residual_out may be residual
// Numerics   the sum is rounded to dtype before it is squared, so the bits are those of an add followed by rms_norm (rms_row.h)
// Algorithm  one block = one to eight rows; a thread adds two pieces of 16 bytes at a time, so that four loads are in flight
// Work/bytes 5*T*H flop; 4*T*H elements: bound by memory
// Measured   ran on an H200 (docs/gpu.md), not timed there
// Limits     H >= 1; host checks in ops/add_rms_norm.cpp. Rows beyond 46 KB are not staged
#include "gpu/gx/gx.h"
#include "gpu/kernels.h"
#include "gpu/rms_row.h"

namespace glmx::gpu {
namespace {

constexpr int kAhead = 2;  // pieces whose loads come before the first store: the compiler may not move loads over stores by itself

template <class T, bool kWide>
__global__ void __launch_bounds__(kNormThreads) add_rms_norm_rows(AddRmsNormParams p, NormPlan plan) {
  GX_DYNAMIC_SHARED(T, stage);
  const int64_t first = int64_t{blockIdx.x} * plan.rows;
  const int rows = rows_here(p.T, plan);
  const T *x = static_cast<const T*>(p.x) + first * p.H, *residual = static_cast<const T*>(p.residual) + first * p.H;
  T* total = static_cast<T*>(p.residual_out) + first * p.H;
  const Rows<T> sums = plan.staged ? Rows<T>{stage, plan.H + gx::kRowLanes} : Rows<T>{total, plan.H};

  const int pieces = (plan.H + kPiece<T> - 1) / kPiece<T>, cells = rows * pieces;
  for (int cell = static_cast<int>(threadIdx.x); cell < cells; cell += kAhead * kNormThreads) {
    Piece<T> a[kAhead], b[kAhead];
    int row[kAhead], i[kAhead], n[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int own = cell + k * kNormThreads < cells ? cell + k * kNormThreads : cell;  // past the end: the first again, not stored
      row[k] = own / pieces;
      i[k] = (own - row[k] * pieces) * kPiece<T>;
      n[k] = plan.H - i[k] < kPiece<T> ? plan.H - i[k] : kPiece<T>;
      const int64_t at = int64_t{row[k]} * plan.H + i[k];
      a[k] = load_piece<kWide>(residual + at, n[k]);
      b[k] = load_piece<kWide>(x + at, n[k]);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (cell + k * kNormThreads >= cells) break;
#pragma unroll
      for (int j = 0; j < kPiece<T>; ++j) a[k].v[j] = a[k].v[j] + b[k].v[j];
      store_piece<kWide>(total + int64_t{row[k]} * plan.H + i[k], a[k], n[k]);
      if (plan.staged) store_piece<kWide>(stage + row[k] * sums.stride + i[k], a[k], n[k]);
    }
  }
  gx::barrier();
  float* rstd = p.rstd == nullptr ? nullptr : p.rstd + first;
  normalise_rows<kWide>(sums, static_cast<const T*>(p.weight), static_cast<T*>(p.y) + first * p.H, rstd, rows, p.eps, plan);
}

template <class T, bool kWide>
void run(const AddRmsNormParams& p) {
  const NormPlan plan = plan_rows<T>("add_rms_norm", p.T, p.H, 1);
  gx::launch("add_rms_norm", add_rms_norm_rows<T, kWide>, plan.grid, kNormThreads, plan.shared, p.device, p, plan);
}

}  // namespace

void add_rms_norm(const AddRmsNormParams& p) {
  const bool wide = wide_rows(p.H * dtype_size(p.dtype), p.x, p.residual, p.weight, p.y, p.residual_out);
  pick_rows(p.dtype, wide, [&](auto type, auto is_wide) { run<decltype(type), is_wide>(p); });
}

}  // namespace glmx::gpu
