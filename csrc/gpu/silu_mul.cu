// silu_mul / gpu: y[t,i] = silu(gate[t,i]) * up[t,i], the SwiGLU activation; backward to gate and up
// Contract   include/glmx/ops.h SiluMulParams   Oracle cpu/inl/silu_mul.inl, bit for bit   Doc docs/ops/silu_mul.md
// Shapes     x, dx [T,2I] dtype row-major, gate columns then up columns | y, dy [T,I] dtype
// Layout     pieces of 16 bytes where I and the pointers allow it, else the same pieces element by element
// Numerics   fp32 inside (gx::exp, exact division), one rounding; gx::silu_mul is also grouped_gemm's epilogue
// Algorithm  one thread = one piece of a row; every element stands alone
// Work/bytes about 50 instructions an element; 3*T*I elements (backward 5*T*I): exp and memory are about even
// Measured   H200, bf16: 3.1 to 3.2 TB/s for 8192 rows, 72 to 75 % of a copy
// Limits     I >= 1; host checks in ops/silu_mul.cpp
#include "gpu/gx/gx.h"
#include "gpu/gx/math.h"
#include "gpu/kernels.h"
#include "gpu/rows.h"

namespace glmx::gpu {
namespace {

template <class T, bool kWide>
__global__ void __launch_bounds__(kCutThreads) silu_mul_pieces(SiluMulParams p, Cut cut) {
  Place at;
  if (!find_place(cut, p.T, at)) return;
  const int n = piece_length<T>(p.I, at.piece);
  const int64_t i = int64_t{at.piece} * kPiece<T>;
  const T* x = static_cast<const T*>(p.x) + at.row * 2 * p.I + i;
  const Piece<T> gate = load_piece<kWide>(x, n), up = load_piece<kWide>(x + p.I, n);
  Piece<T> y;
#pragma unroll
  for (int j = 0; j < kPiece<T>; ++j) y.v[j] = gx::silu_mul(gate.v[j], up.v[j]);
  store_piece<kWide>(static_cast<T*>(p.y) + at.row * p.I + i, y, n);
}

// With s = sigmoid(gate):  d_gate = dy * up * s * (1 + gate * (1 - s)),  d_up = dy * gate * s.
template <class T, bool kWide>
__global__ void __launch_bounds__(kCutThreads) silu_mul_backward_pieces(SiluMulBackwardParams p, Cut cut) {
  Place at;
  if (!find_place(cut, p.T, at)) return;
  const int n = piece_length<T>(p.I, at.piece);
  const int64_t i = int64_t{at.piece} * kPiece<T>, row = at.row * 2 * p.I + i;
  const T* x = static_cast<const T*>(p.x) + row;
  const Piece<T> gate = load_piece<kWide>(x, n), up = load_piece<kWide>(x + p.I, n);
  const Piece<T> grad = load_piece<kWide>(static_cast<const T*>(p.dy) + at.row * p.I + i, n);
  Piece<T> d_gate, d_up;
#pragma unroll
  for (int j = 0; j < kPiece<T>; ++j) {
    const float s = gx::sigmoid(gate.v[j]);
    const float slope = s * gx::fma(gate.v[j], 1.0f - s, 1.0f);
    d_gate.v[j] = (grad.v[j] * up.v[j]) * slope;
    d_up.v[j] = grad.v[j] * (gate.v[j] * s);
  }
  T* dx = static_cast<T*>(p.dx) + row;
  store_piece<kWide>(dx, d_gate, n);
  store_piece<kWide>(dx + p.I, d_up, n);
}

template <class T, bool kWide>
void forward(const SiluMulParams& p) {
  const Cut cut = cut_rows("silu_mul", p.T, pieces_of(p.I, kPiece<T>));
  gx::launch("silu_mul", silu_mul_pieces<T, kWide>, cut.grid, cut.threads, 0, p.device, p, cut);
}

template <class T, bool kWide>
void backward(const SiluMulBackwardParams& p) {
  const Cut cut = cut_rows("silu_mul_backward", p.T, pieces_of(p.I, kPiece<T>));
  gx::launch("silu_mul_backward", silu_mul_backward_pieces<T, kWide>, cut.grid, cut.threads, 0, p.device, p, cut);
}

}  // namespace

void silu_mul(const SiluMulParams& p) {
  const bool wide = wide_rows(p.I * dtype_size(p.dtype), p.x, p.y);
  pick_rows(p.dtype, wide, [&](auto type, auto is_wide) { forward<decltype(type), is_wide>(p); });
}
void silu_mul_backward(const SiluMulBackwardParams& p) {
  const bool wide = wide_rows(p.I * dtype_size(p.dtype), p.x, p.dy, p.dx);
  pick_rows(p.dtype, wide, [&](auto type, auto is_wide) { backward<decltype(type), is_wide>(p); });
}

}  // namespace glmx::gpu
