// The index score of DSA: I = sum over the index heads of weight * relu(q . k). Included after vec.h, inside its anonymous namespace.
#pragma once

// A NaN stays NaN.
inline V16 relu16(V16 x) { return max(x, zero()); }

// Sixteen scores: a chain of fma over the heads in order, from +0. dots: the products of head h with sixteen keys at h * stride.
inline V16 index_score16(const float* dots, int64_t stride, const float* weights, int64_t heads) {
  V16 score = zero();
  for (int64_t h = 0; h < heads; ++h) score = fma(set1(weights[h]), relu16(load(dots + h * stride)), score);
  return score;
}
