// exp, sigmoid, silu and log on one number: the polynomials of csrc/cpu/inl/vec_math.inl and math64.inl, FMA by FMA, so the bits are the
// CPU's. Never the vendor's library: its functions differ in bits between versions and machines. A change here is one there.
#pragma once
#include "gpu/gx/gx.h"

namespace gx {

// a < b ? b : a, as max of csrc/cpu/base/vec.h: a NaN in a stays, one in b is passed over.
__device__ inline float larger(float a, float b) { return a < b ? b : a; }

// 2^a for a in [-126, 127].
__device__ inline float pow2(int32_t a) { return from_bits(static_cast<uint32_t>(a + 127) << 23); }

// Adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits: conversions to int run at a quarter of the rate of these.
inline constexpr float kRound = 0x1.8p+23f;
struct Whole {
  float number;
  int32_t value;
};
__device__ inline Whole whole(float x, float factor) {
  const float shifted = fma(x, factor, kRound);
  return {shifted - kRound, static_cast<int32_t>(to_bits(shifted) - to_bits(kRound))};
}

// n and y = e^r of x = n ln2 + r, |r| <= ln2 / 2; e^r by its Taylor polynomial of degree 7 (truncation 6e-9). For x from -87.34 to 88.73.
struct ExpParts {
  Whole n;
  float y;
};
inline constexpr float kLowestExp = -87.33654f, kHighestExp = 88.72283f;
__device__ inline ExpParts exp_parts(float clamped) {
  const Whole n = whole(clamped, 0x1.715476p+0f);
  const float r = fma(n.number, -0x1.7f7d1cp-20f, fma(n.number, -0x1.62e4p-1f, clamped));
  float y = 0x1.a01a02p-13f;       // 1/5040
  y = fma(y, r, 0x1.6c16c2p-10f);  // 1/720
  y = fma(y, r, 0x1.111112p-7f);   // 1/120
  y = fma(y, r, 0x1.555556p-5f);   // 1/24
  y = fma(y, r, 0x1.555556p-3f);   // 1/6
  y = fma(y, r, 0.5f);
  y = fma(y, r, 1.0f);
  y = fma(y, r, 1.0f);
  return {n, y};
}

// e^x; +inf above 88.72, 0 below -87.33; NaN stays NaN. 2^n is multiplied in two steps so that n = 128 works.
__device__ inline float exp(float x) {
  float clamped = x < kLowestExp ? kLowestExp : x;
  clamped = kHighestExp < clamped ? kHighestExp : clamped;
  const ExpParts e = exp_parts(clamped);
  const int32_t half = whole(e.n.number, 0.5f).value;
  float y = (e.y * pow2(half)) * pow2(e.n.value - half);
  y = x < kLowestExp ? 0.0f : y;
  return kHighestExp < x ? from_bits(0x7f800000u) : y;
}

// exp for x below 88: the same bits in fewer steps.
__device__ inline float exp_below_88(float x) {
  const ExpParts e = exp_parts(x < kLowestExp ? kLowestExp : x);
  return x < kLowestExp ? 0.0f : e.y * pow2(e.n.value);
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + exp(0.0f - x)); }

// sigmoid'(x) = e / (1 + e)^2 with e = exp(-|x|), which keeps its relative accuracy where 1 - sigmoid(x) has none.
__device__ inline float sigmoid_slope(float x) {
  const float e = exp(x < 0.0f ? x : 0.0f - x), d = 1.0f + e;
  return e / d / d;
}

__device__ inline float silu(float x) { return x / (1.0f + exp(0.0f - x)); }

// silu(gate) * up, unrounded: silu_mul and the SwiGLU epilogue of grouped_gemm.
__device__ inline float silu_mul(float gate, float up) { return silu(gate) * up; }

// The same bits without a branch, so that many run side by side, for moderate x: nothing is clamped, and all divisions are plain.
__device__ inline bool moderate(float x) {
  const float size = x < 0.0f ? 0.0f - x : x;
  return size >= 0x1p-60f && size <= 64.0f;
}
__device__ inline float silu_of_moderate(float x) {
  const ExpParts e = exp_parts(0.0f - x);
  return quotient(x, 1.0f + e.y * pow2(e.n.value));
}

// Natural logarithm of normal x > 0; any finite number for other x. x = m 2^n with m in [sqrt(1/2), sqrt(2)); ln m = 2 atanh(s).
__device__ inline float log(float x) {
  const uint32_t bits = to_bits(x);
  const int32_t exponent = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;  // 0x3f3504f3: sqrt(1/2)
  const float m = from_bits(bits - (static_cast<uint32_t>(exponent) << 23)), n = static_cast<float>(exponent);
  const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
  float series = 0x1.c71c72p-3f;            // 2/9
  series = fma(series, z, 0x1.24924ap-2f);  // 2/7
  series = fma(series, z, 0x1.99999ap-2f);  // 2/5
  series = fma(series, z, 0x1.555556p-1f);  // 2/3
  const float small = fma(s * z, series, n * 0x1.7f7d1cp-20f);
  return fma(n, 0x1.62e4p-1f, (s + s) + small);
}

__device__ inline uint64_t to_bits64(double x) {
  uint64_t bits;
  memcpy(&bits, &x, 8);
  return bits;
}
__device__ inline double from_bits64(uint64_t bits) {
  double x;
  memcpy(&x, &bits, 8);
  return x;
}

inline constexpr double kLn2High = 0x1.62e42fefa39efp-1, kLn2Low = 0x1.abc9e3b39803fp-56;

// Natural logarithm of a normal x > 0 in fp64; +inf and NaN are returned as they are. As log, its series to s^23.
__device__ inline double log64(double x) {
  if (!(x <= 0x1.fffffffffffffp+1023)) return x;
  constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcdu;
  const int64_t e = static_cast<int64_t>(to_bits64(x) - kSqrtHalf) >> 52;
  const double m = from_bits64(to_bits64(x) - (static_cast<uint64_t>(e) << 52));
  const double s = (m - 1.0) / (m + 1.0), z = s * s;
  double series = 2.0 / 23.0;
#pragma unroll
  for (int k = 21; k >= 3; k -= 2) series = fma(series, z, 2.0 / k);
  const double n = static_cast<double>(e);
  const double low = fma(n, kLn2Low, s * z * series);
  return fma(n, kLn2High, fma(2.0, s, low));
}

// e^x in fp64 for |x| < 700. x = n ln2 + r, |r| <= ln2 / 2; Taylor series to r^13.
__device__ inline double exp64(double x) {
  constexpr double kMagic = 0x1.8p+52;  // adding and taking it rounds to a whole number
  const double n = fma(x, 0x1.71547652b82fep+0, kMagic) - kMagic;
  const double r = fma(n, -kLn2Low, fma(n, -kLn2High, x));
  double y = 1.0;
#pragma unroll
  for (int k = 13; k >= 1; --k) y = fma(y * r, 1.0 / k, 1.0);
  return y * from_bits64(static_cast<uint64_t>(static_cast<int64_t>(n) + 1023) << 52);
}

}  // namespace gx
