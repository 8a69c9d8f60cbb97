// rms_norm: y[t] = weight * round(x[t] * rstd[t]), rstd = 1 / sqrt(mean(x^2) + eps); backward to x and weight
// Contract   include/glmx/ops.h RmsNormParams   Oracle reference/rms_norm.py   Doc docs/ops/rms_norm.md
// Shapes     x, y [T,H] dtype row-major | weight [H] dtype | rstd [T] f32 | d_weight [H] f32
// Layout     rows are read twice (the second time from L1); tails run the same code on masked lanes
// Numerics   sum of squares in 16 lanes, folded in one order; exact sqrt and division; rounded to dtype before and after the weight
// Algorithm  one work item = 64 rows; the backward sums d_weight over those 64 rows, then over the blocks in order
// Work/bytes 4*T*H flop; 2*T*H elements: bound by memory
// Measured   not measured yet (speed is step 5)
// Limits     T, H >= 1 rows of any length; host checks in ops/rms_norm.cpp
#include "cpu/inl/rms_row.inl"

template <class T>
void forward_row(const RmsNormParams& p, int64_t t) {
  const T* x = static_cast<const T*>(p.x) + t * p.H;
  const T* weight = static_cast<const T*>(p.weight);
  T* y = static_cast<T*>(p.y) + t * p.H;
  V16 sum = zero();
  for (int64_t i = 0; i < p.H; i += 16) {
    fetch_ahead(x + i);
    const V16 a = load_n(x + i, lanes(p.H - i));
    sum = fma(a, a, sum);
  }
  const float rstd = normalise_row(x, weight, y, p.H, sum, p.eps);
  if (p.rstd != nullptr) p.rstd[t] = rstd;
}

template <class T>
void forward_block(void* context, int64_t block) {
  const RmsNormParams& p = *static_cast<const RmsNormParams*>(context);
  const int64_t end = min_i64(p.T, (block + 1) * kNormRows);
  for (int64_t t = block * kNormRows; t < end; ++t) forward_row<T>(p, t);
}

inline void rms_norm_forward(const RmsNormParams& p) {
  const int64_t blocks = (p.T + kNormRows - 1) / kNormRows;
  parallel_items(blocks, p.T * p.H / 2, p.dtype == DType::bf16 ? forward_block<uint16_t> : forward_block<float>,
                 const_cast<RmsNormParams*>(&p));
}

// With g = dy * weight and n = x * rstd:  dx = rstd * (g - n * mean(g * n)),  d_weight += dy * n.
template <class T>
void backward_row(const RmsNormBackwardParams& p, int64_t t, float* d_weight) {
  const T* x = static_cast<const T*>(p.x) + t * p.H;
  const T* dy = static_cast<const T*>(p.dy) + t * p.H;
  const T* weight = static_cast<const T*>(p.weight);
  T* dx = static_cast<T*>(p.dx) + t * p.H;
  const V16 rstd = set1(p.rstd[t]);
  V16 sum = zero();
  for (int64_t i = 0; i < p.H; i += 16) {
    const int n = lanes(p.H - i);
    fetch_ahead(x + i), fetch_ahead(dy + i);
    const V16 normed = mul(load_n(x + i, n), rstd), grad = load_n(dy + i, n);
    sum = fma(mul(grad, load_n(weight + i, n)), normed, sum);
    store_n(d_weight + i, fma(grad, round_to(normed, x), load_n(d_weight + i, n)), n);
  }
  const V16 mean = set1(fold_add(sum) / static_cast<float>(p.H));
  for (int64_t i = 0; i < p.H; i += 16) {
    const int n = lanes(p.H - i);
    const V16 normed = mul(load_n(x + i, n), rstd);
    const V16 g = mul(load_n(dy + i, n), load_n(weight + i, n));
    store_n(dx + i, mul(rstd, sub(g, mul(normed, mean))), n);
  }
}

template <class T>
void backward_block(void* context, int64_t block) {
  const RmsNormBackwardParams& p = *static_cast<const RmsNormBackwardParams*>(context);
  float* d_weight = p.partial + block * p.H;
  for (int64_t i = 0; i < p.H; ++i) d_weight[i] = 0.0f;
  const int64_t end = min_i64(p.T, (block + 1) * kNormRows);
  for (int64_t t = block * kNormRows; t < end; ++t) backward_row<T>(p, t, d_weight);
}

inline void sum_blocks(void* context, int64_t column_block) {
  const RmsNormBackwardParams& p = *static_cast<const RmsNormBackwardParams*>(context);
  const int64_t i = column_block * 16;
  const int n = lanes(p.H - i);
  V16 sum = zero();
  for (int64_t b = 0; b < (p.T + kNormRows - 1) / kNormRows; ++b) sum = add(sum, load_n(p.partial + b * p.H + i, n));
  if (p.accumulate) sum = add(load_n(p.d_weight + i, n), sum);
  store_n(p.d_weight + i, sum, n);
}

inline void rms_norm_backward_rows(const RmsNormBackwardParams& p) {
  void* context = const_cast<RmsNormBackwardParams*>(&p);
  const int64_t blocks = (p.T + kNormRows - 1) / kNormRows;
  parallel_items(blocks, p.T * p.H, p.dtype == DType::bf16 ? backward_block<uint16_t> : backward_block<float>, context);
  parallel_items((p.H + 15) / 16, blocks * p.H / 4, sum_blocks, context);
}
