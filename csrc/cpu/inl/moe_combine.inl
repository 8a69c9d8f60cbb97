// moe_combine: out[t] = sum over k of topk_weights[t,k] * rows[inverse[t,k]]; backward to rows and weights
// Contract   include/glmx/ops.h MoeCombineParams   Oracle reference/moe_combine.py   Doc docs/ops/moe_combine.md
// Shapes     rows, d_rows [R,H] dtype | topk_weights, d_topk_weights [T,K] f32 | inverse [T,K] i32 | out, d_out [T,H] dtype
// Layout     row-major, any H; the last columns run the same code on masked lanes
// Numerics   forward: fma from +0 in the order of k, one rounding, column by column, so neither T nor the sort of the rows can show;
//            d_rows: one product, one rounding; d_topk_weights: 16 lanes, folded
// Algorithm  forward: one item = 32 tokens, 64 columns at a time stay in registers while k runs over the rows. Backward: the pair of each
//            row is looked up (p.pair_of_row, filled by the host), one item = 64 rows, so rows and d_rows stream and nothing is shared
// Work/bytes 2*T*K*H flop; T*K*H + T*H elements forward, 3*T*K*H backward: bound by memory
// Measured   one core of a shared AMD EPYC (Zen 4), bf16, H = 256, K = 4, T = 4096: 190 ns a token forward, 250 ns backward
// Limits     rows named by inverse are checked in ops/moe_combine.cpp

#include "cpu/inl/rows.inl"

constexpr int64_t kTokens = 32, kRows = 64;  // an item is 16 to 100 us at H = 4096, K = 8: long against the counter, short against a step
constexpr int kWide = 4;                     // V16 per pass: four accumulators hide the latency of fma

template <class T>
void combine_token(const MoeCombineParams& p, int64_t t) {
  const T* rows = static_cast<const T*>(p.rows);
  const int32_t* inverse = p.inverse + t * p.K;
  const float* weights = p.topk_weights == nullptr ? nullptr : p.topk_weights + t * p.K;
  T* out = static_cast<T*>(p.out) + t * p.H;
  int64_t i = 0;
  for (; i + 16 * kWide <= p.H; i += 16 * kWide) {
    V16 sum[kWide] = {zero(), zero(), zero(), zero()};
    for (int64_t k = 0; k < p.K; ++k) {
      if (inverse[k] < 0) continue;
      const T* row = rows + inverse[k] * p.H + i;
      const V16 w = set1(weights == nullptr ? 1.0f : weights[k]);
      fetch_ahead(row), fetch_ahead(row + 32);
      for (int j = 0; j < kWide; ++j) sum[j] = fma(w, load(row + 16 * j), sum[j]);
    }
    for (int j = 0; j < kWide; ++j) store(out + i + 16 * j, sum[j]);
  }
  for (; i < p.H; i += 16) {
    const int n = lanes(p.H - i);
    V16 sum = zero();
    for (int64_t k = 0; k < p.K; ++k) {
      if (inverse[k] < 0) continue;
      sum = fma(set1(weights == nullptr ? 1.0f : weights[k]), load_n(rows + inverse[k] * p.H + i, n), sum);
    }
    store_n(out + i, sum, n);
  }
}

template <class T>
void combine_block(void* context, int64_t block) {
  const MoeCombineParams& p = *static_cast<const MoeCombineParams*>(context);
  const int64_t end = min_i64((block + 1) * kTokens, p.T);
  for (int64_t t = block * kTokens; t < end; ++t) combine_token<T>(p, t);
}

inline void moe_combine_forward(const MoeCombineParams& p) {
  void* context = const_cast<MoeCombineParams*>(&p);
  parallel_items((p.T + kTokens - 1) / kTokens, p.T * p.K * p.H / 5,
                 p.dtype == DType::bf16 ? combine_block<uint16_t> : combine_block<float>, context);
}

template <class T>
void backward_row(const MoeCombineBackwardParams& p, int64_t r) {
  T* d_row = static_cast<T*>(p.d_rows) + r * p.H;
  const int64_t pair = p.pair_of_row[r];
  if (pair < 0) {
    for (int64_t i = 0; i < p.H; ++i) d_row[i] = T{};
    return;
  }
  const T* row = static_cast<const T*>(p.rows) + r * p.H;
  const T* d_out = static_cast<const T*>(p.d_out) + pair / p.K * p.H;
  const V16 w = set1(p.topk_weights == nullptr ? 1.0f : p.topk_weights[pair]);
  V16 dot = zero();
  for (int64_t i = 0; i < p.H; i += 16) {
    const int n = lanes(p.H - i);
    fetch_ahead(d_out + i), fetch_ahead(row + i);
    const V16 d = load_n(d_out + i, n);
    dot = fma(d, load_n(row + i, n), dot);
    store_n(d_row + i, mul(w, d), n);
  }
  if (p.d_topk_weights != nullptr) p.d_topk_weights[pair] = fold_add(dot);
}

template <class T>
void backward_block(void* context, int64_t block) {
  const MoeCombineBackwardParams& p = *static_cast<const MoeCombineBackwardParams*>(context);
  const int64_t end = min_i64((block + 1) * kRows, p.R);
  for (int64_t r = block * kRows; r < end; ++r) backward_row<T>(p, r);
}

inline void moe_combine_backward_rows(const MoeCombineBackwardParams& p) {
  void* context = const_cast<MoeCombineBackwardParams*>(&p);
  parallel_items((p.R + kRows - 1) / kRows, p.R * p.H / 4, p.dtype == DType::bf16 ? backward_block<uint16_t> : backward_block<float>,
                 context);
}
