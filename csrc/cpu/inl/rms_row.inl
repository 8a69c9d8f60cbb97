// The row of rms_norm and add_rms_norm. Included after rows.inl, inside the anonymous namespace.
#pragma once
#include "cpu/inl/rows.inl"

constexpr int64_t kNormRows = 64;  // rows of a work item; the backward sums d_weight over them first, so it is part of the bits

inline float scalar_rsqrt(float mean_plus_eps) {
  float root[16];
  store(root, div(set1(1.0f), sqrt(set1(mean_plus_eps))));
  return root[0];
}

// y = weight * round(x * rstd), given the lanes' sums of squares of x; returns rstd.
template <class T>
float normalise_row(const T* x, const T* weight, T* y, int64_t H, V16 squares, float eps) {
  const float rstd = scalar_rsqrt(fold_add(squares) / static_cast<float>(H) + eps);
  const V16 scale = set1(rstd);
  for (int64_t i = 0; i < H; i += 16) {
    const int n = lanes(H - i);
    const V16 normed = round_to(mul(load_n(x + i, n), scale), x);
    store_n(y + i, mul(load_n(weight + i, n), normed), n);
  }
  return rstd;
}
