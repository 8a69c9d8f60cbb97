// layer_norm: y[t] = (x[t] - mean[t]) * rstd[t] * weight + bias, rstd = 1 / sqrt(var + eps); backward to x, weight and bias
// Contract   include/glmx/ops.h LayerNormParams   Oracle reference/layer_norm.py   Doc docs/ops/layer_norm.md
// Shapes     x, y [T,H] dtype row-major | weight, bias [H] dtype | mean, rstd [T] f32 | d_weight, d_bias [H] f32
// Layout     rows are read three times (twice from L1); tails run the same code on masked lanes
// Numerics   both sums in 16 lanes, folded in one order; lanes past the row add nothing; exact sqrt and division; one rounding
// Algorithm  one work item = 64 rows; the backward sums d_weight and d_bias over those 64 rows, then over the blocks in order
// Work/bytes 8*T*H flop; 2*T*H elements: bound by memory
// Measured   not measured yet (speed is step 5)
// Limits     rows of any length H >= 1; host checks in ops/layer_norm.cpp
#include "cpu/inl/rms_row.inl"

// x[0 .. n) - mean. A lane past the row holds 0: there x is taken to be the mean.
template <class T>
V16 centred(const T* x, V16 mean, int n) {
  if (n >= 16) return sub(load(x), mean);
  float padded[16];
  store(padded, mean);
  store_n(padded, load_n(x, n), n);
  return sub(load(padded), mean);
}

template <class T>
void forward_row(const LayerNormParams& p, int64_t t) {
  const T* x = static_cast<const T*>(p.x) + t * p.H;
  const T *weight = static_cast<const T*>(p.weight), *bias = static_cast<const T*>(p.bias);
  T* y = static_cast<T*>(p.y) + t * p.H;
  V16 sum = zero(), squares = zero();
  for (int64_t i = 0; i < p.H; i += 16) {
    fetch_ahead(x + i);
    sum = add(sum, load_n(x + i, lanes(p.H - i)));
  }
  const float mean = fold_add(sum) / static_cast<float>(p.H);
  const V16 shift = set1(mean);
  for (int64_t i = 0; i < p.H; i += 16) {
    const V16 a = centred(x + i, shift, lanes(p.H - i));
    squares = fma(a, a, squares);
  }
  const float rstd = scalar_rsqrt(fold_add(squares) / static_cast<float>(p.H) + p.eps);
  const V16 scale = set1(rstd);
  for (int64_t i = 0; i < p.H; i += 16) {
    const int n = lanes(p.H - i);
    store_n(y + i, fma(mul(centred(x + i, shift, n), scale), load_n(weight + i, n), load_n(bias + i, n)), n);
  }
  if (p.mean != nullptr) p.mean[t] = mean;
  if (p.rstd != nullptr) p.rstd[t] = rstd;
}

template <class T>
void forward_block(void* context, int64_t block) {
  const LayerNormParams& p = *static_cast<const LayerNormParams*>(context);
  const int64_t end = min_i64(p.T, (block + 1) * kNormRows);
  for (int64_t t = block * kNormRows; t < end; ++t) forward_row<T>(p, t);
}

inline void layer_norm_forward(const LayerNormParams& p) {
  const int64_t blocks = (p.T + kNormRows - 1) / kNormRows;
  parallel_items(blocks, p.T * p.H, p.dtype == DType::bf16 ? forward_block<uint16_t> : forward_block<float>,
                 const_cast<LayerNormParams*>(&p));
}

// With g = dy * weight and n = (x - mean) * rstd:  dx = rstd * (g - mean(g) - n * mean(g * n)),  d_weight += dy * n,  d_bias += dy.
template <class T>
void backward_row(const LayerNormBackwardParams& p, int64_t t, float* d_weight, float* d_bias) {
  const T* x = static_cast<const T*>(p.x) + t * p.H;
  const T* dy = static_cast<const T*>(p.dy) + t * p.H;
  const T* weight = static_cast<const T*>(p.weight);
  T* dx = static_cast<T*>(p.dx) + t * p.H;
  const V16 shift = set1(p.mean[t]), scale = set1(p.rstd[t]);
  V16 sum_g = zero(), sum_gn = zero();
  for (int64_t i = 0; i < p.H; i += 16) {
    const int n = lanes(p.H - i);
    fetch_ahead(x + i), fetch_ahead(dy + i);
    const V16 normed = mul(centred(x + i, shift, n), scale), grad = load_n(dy + i, n);
    const V16 g = mul(grad, load_n(weight + i, n));
    sum_g = add(sum_g, g);
    sum_gn = fma(g, normed, sum_gn);
    store_n(d_weight + i, fma(grad, normed, load_n(d_weight + i, n)), n);
    store_n(d_bias + i, add(load_n(d_bias + i, n), grad), n);
  }
  const V16 mean_g = set1(fold_add(sum_g) / static_cast<float>(p.H)), mean_gn = set1(fold_add(sum_gn) / static_cast<float>(p.H));
  for (int64_t i = 0; i < p.H; i += 16) {
    const int n = lanes(p.H - i);
    const V16 normed = mul(centred(x + i, shift, n), scale);
    const V16 g = mul(load_n(dy + i, n), load_n(weight + i, n));
    store_n(dx + i, mul(scale, sub(sub(g, mean_g), mul(normed, mean_gn))), n);
  }
}

template <class T>
void backward_block(void* context, int64_t block) {
  const LayerNormBackwardParams& p = *static_cast<const LayerNormBackwardParams*>(context);
  float* partial = p.partial + block * 2 * p.H;
  for (int64_t i = 0; i < 2 * p.H; ++i) partial[i] = 0.0f;
  const int64_t end = min_i64(p.T, (block + 1) * kNormRows);
  for (int64_t t = block * kNormRows; t < end; ++t) backward_row<T>(p, t, partial, partial + p.H);
}

// Sixteen columns of the blocks' sums, blocks in order.
inline void sum_columns(const float* partial, int64_t blocks, int64_t stride, bool accumulate, float* out, int n) {
  V16 sum = zero();
  for (int64_t b = 0; b < blocks; ++b) sum = add(sum, load_n(partial + b * stride, n));
  store_n(out, accumulate ? add(load_n(out, n), sum) : sum, n);
}

inline void sum_blocks(void* context, int64_t column_block) {
  const LayerNormBackwardParams& p = *static_cast<const LayerNormBackwardParams*>(context);
  const int64_t i = column_block * 16, blocks = (p.T + kNormRows - 1) / kNormRows;
  const int n = lanes(p.H - i);
  sum_columns(p.partial + i, blocks, 2 * p.H, p.accumulate_weight, p.d_weight + i, n);
  sum_columns(p.partial + p.H + i, blocks, 2 * p.H, p.accumulate_bias, p.d_bias + i, n);
}

inline void layer_norm_backward_rows(const LayerNormBackwardParams& p) {
  void* context = const_cast<LayerNormBackwardParams*>(&p);
  const int64_t blocks = (p.T + kNormRows - 1) / kNormRows;
  parallel_items(blocks, p.T * p.H * 2, p.dtype == DType::bf16 ? backward_block<uint16_t> : backward_block<float>, context);
  parallel_items((p.H + 15) / 16, blocks * p.H / 2, sum_blocks, context);
}
