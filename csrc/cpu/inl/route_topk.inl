// route_topk: sigmoid scores, a biased selection inside the best groups, normalised weights, counts; backward to the logits
// Contract   include/glmx/ops.h RouteTopkParams   Oracle reference/route_topk.py   Doc docs/ops/route_topk.md
// Shapes     logits, scores, d_scores, d_logits [T,E] f32 | bias [E] f32 | topk_weights [T,K] f32 | topk_ids [T,K] i32 | counts [E] i32
// Layout     row-major, any E <= 512; the last experts run the same code on masked lanes
// Numerics   selection on c = s + bias in fp32: NaN counts as -inf, IEEE comparison makes -0 equal +0. Weights: sum in the order of k.
//            Backward: s' = e / (1 + e)^2 with e = exp(-|x|), which keeps its relative accuracy where 1 - s has none
// Algorithm  an item is 64 tokens. A token's selection is K rounds: the maximum over vectors of 16 experts, folded, then the first
//            lane that equals it, found by a mask of 64 experts at a time: no branch depends on the values while E <= 64.
//            Counts are summed over the item, then added to the total as integers
// Work/bytes about 30 flop an expert; 4*T*E bytes in: bound by arithmetic
// Measured   one core of a shared AMD EPYC (Zen 4), AVX-512, T = 4096: 110 ns a token at E = 32, K = 4 and 360 ns at E = 128, K = 8;
//            backward 60 and 70 ns
// Limits     1 <= K <= E <= 512 and the groups are checked in ops/route_topk.cpp

#include "cpu/inl/rows.inl"
#include "cpu/inl/vec_math.inl"

constexpr int kMaxExperts = 512, kTokens = 64;

// The indices of the k largest of value[0..n), descending, ties to the lower index. No NaN among the values: it marks the ones
// already taken, and up to the next multiple of 16 the array is scratch.
inline void largest(float* value, int n, int k, int32_t* index) {
  const float taken = __builtin_nanf("");
  for (int i = n; i % 16 != 0; ++i) value[i] = taken;
  for (int j = 0; j < k; ++j) {
    V16 lane_best = set1(-__builtin_inff());
    for (int i = 0; i < n; i += 16) lane_best = max(lane_best, load(value + i));
    const V16 best = set1(fold_max(lane_best));
    uint64_t equal = 0;
    int at = 0;
    for (; at < n; at += 64) {
      for (int i = 0; i < 64 && at + i < n; i += 16) equal |= uint64_t{mask_eq(load(value + at + i), best)} << i;
      if (equal != 0) break;
    }
    at += __builtin_ctzll(equal);
    index[j] = at;
    float* vector = value + (at & ~15);
    store(vector, set_lane(load(vector), at & 15, taken));
  }
}

// Experts outside the best topk_group groups get -inf. A group's score is the sum of its two largest values.
inline void mask_groups(const RouteTopkParams& p, float* value) {
  const int groups = static_cast<int>(p.n_group), size = static_cast<int>(p.E / p.n_group), keep = static_cast<int>(p.topk_group);
  const float lowest = -__builtin_inff();
  float score[kMaxExperts];
  int32_t kept[kMaxExperts];
  bool masked[kMaxExperts];
  for (int g = 0; g < groups; ++g) {
    float first = lowest, second = lowest;
    for (int j = 0; j < size; ++j) {
      const float v = value[g * size + j];
      const float lower = first < v ? first : v;
      second = second < lower ? lower : second;
      first = first < v ? v : first;
    }
    const float sum = size == 1 ? first : first + second;
    score[g] = sum == sum ? sum : lowest;  // inf - inf
    masked[g] = true;
  }
  largest(score, groups, keep, kept);
  for (int j = 0; j < keep; ++j) masked[kept[j]] = false;
  for (int g = 0; g < groups; ++g) {
    if (!masked[g]) continue;
    for (int j = 0; j < size; ++j) value[g * size + j] = lowest;
  }
}

inline void route_token(const RouteTopkParams& p, int64_t t, int32_t* counts) {
  const int E = static_cast<int>(p.E), K = static_cast<int>(p.K);
  const float* logits = p.logits + t * p.E;
  float score[kMaxExperts], biased[kMaxExperts], weight[kMaxExperts];
  const V16 lowest = set1(-__builtin_inff());
  for (int i = 0; i < E; i += 16) {
    const int n = lanes(E - i);
    const V16 s = sigmoid16(load_n(logits + i, n));
    const V16 c = add(s, load_n(p.bias + i, n));
    store(score + i, s);
    store(biased + i, select_lt(lowest, c, c, lowest));
    if (p.scores != nullptr) store_n(p.scores + t * p.E + i, s, n);
  }
  if (p.n_group > 1) mask_groups(p, biased);

  int32_t* ids = p.topk_ids + t * p.K;
  largest(biased, E, K, ids);
  float sum = 0.0f;
  for (int k = 0; k < K; ++k) {
    weight[k] = score[ids[k]];
    sum += weight[k];
    ++counts[ids[k]];
  }
  const V16 denominator = set1(p.norm_topk_prob ? sum + 1e-20f : 1.0f), scale = set1(p.routed_scaling_factor);
  for (int k = 0; k < K; k += 16) {
    const int n = lanes(K - k);
    store_n(p.topk_weights + t * p.K + k, mul(div(load_n(weight + k, n), denominator), scale), n);
  }
}

inline void route_block(void* context, int64_t block) {
  const RouteTopkParams& p = *static_cast<const RouteTopkParams*>(context);
  int32_t counts[kMaxExperts];
  for (int64_t e = 0; e < p.E; ++e) counts[e] = 0;
  const int64_t end = min_i64((block + 1) * kTokens, p.T);
  for (int64_t t = block * kTokens; t < end; ++t) route_token(p, t, counts);
  for (int64_t e = 0; e < p.E; ++e) {  // integers: the order of the additions cannot show
    if (counts[e] != 0) __atomic_fetch_add(p.expert_counts + e, counts[e], __ATOMIC_RELAXED);
  }
}

inline void route_topk_forward(const RouteTopkParams& p) {
  for (int64_t e = 0; e < p.E; ++e) p.expert_counts[e] = 0;
  parallel_items((p.T + kTokens - 1) / kTokens, p.T * p.E * 3, route_block, const_cast<RouteTopkParams*>(&p));
}

// sigmoid'(x) = e / (1 + e)^2 with e = exp(-|x|)
inline V16 sigmoid_slope(V16 x) {
  const V16 e = exp16(select_lt(x, zero(), x, sub(zero(), x))), d = add(set1(1.0f), e);
  return div(div(e, d), d);
}

// With w = f * s / D, D = sum of s + 1e-20:  ds_k = f * (dw_k - (sum of dw * s) / D) / D;  without norm_topk_prob ds_k = f * dw_k.
inline void backward_token(const RouteTopkBackwardParams& p, int64_t t) {
  const int E = static_cast<int>(p.E), K = static_cast<int>(p.K);
  const float* logits = p.logits + t * p.E;
  float* d_logits = p.d_logits + t * p.E;
  for (int i = 0; i < E; i += 16) {
    const int n = lanes(E - i);
    const V16 d = p.d_scores == nullptr ? zero() : mul(load_n(p.d_scores + t * p.E + i, n), sigmoid_slope(load_n(logits + i, n)));
    store_n(d_logits + i, d, n);
  }
  if (p.d_topk_weights == nullptr) return;
  const int32_t* ids = p.topk_ids + t * p.K;
  const float* d_weights = p.d_topk_weights + t * p.K;
  float x[kMaxExperts], d[kMaxExperts];
  for (int k = 0; k < K; ++k) x[k] = logits[ids[k]];
  V16 dot = zero(), denominator = set1(1.0f);
  if (p.norm_topk_prob) {
    float sum = 0.0f;
    for (int k = 0; k < K; k += 16) {
      const int n = lanes(K - k);
      const V16 s = sigmoid16(load_n(x + k, n));
      dot = fma(load_n(d_weights + k, n), s, dot);  // lanes past n are 0 * 1/2
      store(d, s);
      for (int j = 0; j < n; ++j) sum += d[j];
    }
    denominator = set1(sum + 1e-20f);
    dot = div(set1(fold_add(dot)), denominator);
  }
  for (int k = 0; k < K; k += 16) {
    const int n = lanes(K - k);
    const V16 ds = mul(set1(p.routed_scaling_factor), div(sub(load_n(d_weights + k, n), dot), denominator));
    store(d + k, mul(ds, sigmoid_slope(load_n(x + k, n))));
  }
  for (int k = 0; k < K; ++k) d_logits[ids[k]] += d[k];
}

inline void backward_block(void* context, int64_t block) {
  const RouteTopkBackwardParams& p = *static_cast<const RouteTopkBackwardParams*>(context);
  const int64_t end = min_i64((block + 1) * kTokens, p.T);
  for (int64_t t = block * kTokens; t < end; ++t) backward_token(p, t);
}

inline void route_topk_backward_tokens(const RouteTopkBackwardParams& p) {
  parallel_items((p.T + kTokens - 1) / kTokens, p.T * (50 + p.E / 4), backward_block, const_cast<RouteTopkBackwardParams*>(&p));
}
