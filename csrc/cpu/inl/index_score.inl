// The index score of DSA: I = sum over the index heads of weight * relu(q . k). Included after vec.h, inside its anonymous namespace.
#pragma once

// A NaN stays NaN.
inline V16 relu16(V16 x) { return max(x, zero()); }

// Scores of 16 * vecs keys: for each a chain of fma over the heads in order, from +0. dots: the products of head h at h * stride.
template <int vecs>
inline void index_scores_of(const float* dots, int64_t stride, const float* weights, int64_t heads, V16 (&score)[vecs]) {
  for (V16& s : score) s = zero();
  for (int64_t h = 0; h < heads; ++h) {
    const V16 weight = set1(weights[h]);
#pragma GCC unroll 4
    for (int j = 0; j < vecs; ++j) score[j] = fma(weight, relu16(load(dots + h * stride + 16 * j)), score[j]);
  }
}
