// add_rms_norm: residual_out[t] = round(residual[t] + x[t]), y[t] = rms_norm(residual_out[t])
// Contract   include/glmx/ops.h AddRmsNormParams   Oracle reference/add_rms_norm.py   Doc docs/ops/add_rms_norm.md
// Shapes     x, residual, residual_out, y [T,H] dtype row-major | weight [H] dtype | rstd [T] f32
// Layout     residual_out is written in the first pass and read in the second (from L1); it may be residual itself
// Numerics   the sum is rounded to dtype before it is squared, so the bits are those of an add followed by rms_norm (rms_row.inl)
// Algorithm  one work item = 64 rows
// Work/bytes 5*T*H flop; 4*T*H elements: bound by memory
// Measured   164 ns per row of 256 bf16 (fp32 48); AVX2 161: one thread of a shared Zen 4 machine, processor time
// Limits     H >= 1; host checks in ops/add_rms_norm.cpp
#include "cpu/inl/rms_row.inl"

template <class T>
void add_norm_row(const AddRmsNormParams& p, int64_t t) {
  const T* x = static_cast<const T*>(p.x) + t * p.H;
  const T* residual = static_cast<const T*>(p.residual) + t * p.H;
  T* total = static_cast<T*>(p.residual_out) + t * p.H;
  V16 squares = zero();
  for (int64_t i = 0; i < p.H; i += 16) {
    const int n = lanes(p.H - i);
    fetch_ahead(residual + i), fetch_ahead(x + i);
    const V16 a = round_to(add(load_n(residual + i, n), load_n(x + i, n)), x);
    store_n(total + i, a, n);
    squares = fma(a, a, squares);
  }
  T* y = static_cast<T*>(p.y) + t * p.H;
  const float rstd = normalise_row<T>(total, static_cast<const T*>(p.weight), y, p.H, squares, p.eps);
  if (p.rstd != nullptr) p.rstd[t] = rstd;
}

template <class T>
void add_norm_block(void* context, int64_t block) {
  const AddRmsNormParams& p = *static_cast<const AddRmsNormParams*>(context);
  const int64_t end = min_i64(p.T, (block + 1) * kNormRows);
  for (int64_t t = block * kNormRows; t < end; ++t) add_norm_row<T>(p, t);
}

inline void add_rms_norm_rows(const AddRmsNormParams& p) {
  const int64_t blocks = (p.T + kNormRows - 1) / kNormRows;
  parallel_items(blocks, p.T * p.H / 2, p.dtype == DType::bf16 ? add_norm_block<uint16_t> : add_norm_block<float>,
                 const_cast<AddRmsNormParams*>(&p));
}
