// exp, sigmoid, silu and log on V16: one polynomial for every ISA, FMA by FMA. Included after vec.h, inside its anonymous namespace.
// Never libm: its vector and scalar forms differ in bits between machines and glibc versions.
#pragma once

// n and y = e^r of x = n ln2 + r, |r| <= ln2 / 2; e^r by its Taylor polynomial of degree 7 (truncation 6e-9). For x from -87.34 to 88.73.
struct ExpParts {
  V16 n, y;
};
inline V16 lowest_exp16() { return set1(-87.33654f); }
inline ExpParts exp_parts16(V16 clamped) {
  const V16 kLog2e = set1(0x1.715476p+0f), kMagic = set1(0x1.8p+23f);  // adding and taking 1.5 * 2^23 rounds to a whole number
  const V16 kLn2Hi = set1(-0x1.62e4p-1f), kLn2Lo = set1(-0x1.7f7d1cp-20f);
  const V16 n = sub(fma(clamped, kLog2e, kMagic), kMagic);
  const V16 r = fma(n, kLn2Lo, fma(n, kLn2Hi, clamped));
  V16 y = set1(0x1.a01a02p-13f);         // 1/5040
  y = fma(y, r, set1(0x1.6c16c2p-10f));  // 1/720
  y = fma(y, r, set1(0x1.111112p-7f));   // 1/120
  y = fma(y, r, set1(0x1.555556p-5f));   // 1/24
  y = fma(y, r, set1(0x1.555556p-3f));   // 1/6
  y = fma(y, r, set1(0.5f));
  y = fma(y, r, set1(1.0f));
  y = fma(y, r, set1(1.0f));
  return {n, y};
}

// e^x, within 1 ulp (worst seen 0.94, sampled over the whole range); +inf above 88.72, 0 below -87.33 (results that would be denormal
// are flushed); NaN stays NaN.
// 2^n is multiplied in two steps so that n = 128 works.
inline V16 exp16(V16 x) {
  const V16 kMagic = set1(0x1.8p+23f), lowest = lowest_exp16(), highest = set1(88.72283f);
  V16 clamped = select_lt(x, lowest, lowest, x);
  clamped = select_lt(highest, clamped, highest, clamped);
  const ExpParts e = exp_parts16(clamped);
  const V16 half = sub(fma(e.n, set1(0.5f), kMagic), kMagic);
  V16 y = mul(mul(e.y, pow2(half)), pow2(sub(e.n, half)));
  y = select_lt(x, lowest, zero(), y);
  return select_lt(highest, x, set1(__builtin_inff()), y);
}

// exp16 for x below 88: the same bits in fewer steps.
inline V16 exp16_below_88(V16 x) {
  const V16 lowest = lowest_exp16();
  const ExpParts e = exp_parts16(select_lt(x, lowest, lowest, x));
  return select_lt(x, lowest, zero(), mul(e.y, pow2(e.n)));
}

// 1 / (1 + e^-x), within 2.5 ulp; 0 below -88.72, where e^-x leaves the range
inline V16 sigmoid16(V16 x) {
  const V16 one = set1(1.0f);
  return div(one, add(one, exp16(sub(zero(), x))));
}

// x / (1 + e^-x)
inline V16 silu16(V16 x) { return div(x, add(set1(1.0f), exp16(sub(zero(), x)))); }

// silu(gate) * up, unrounded: silu_mul and the SwiGLU epilogue of grouped_gemm.
inline V16 silu_mul16(V16 gate, V16 up) { return mul(silu16(gate), up); }

// Natural logarithm of normal x > 0, within 2 ulp; any finite number for other x.
// x = m 2^n with m in [sqrt(1/2), sqrt(2)); ln m = 2 atanh(s), s = (m - 1) / (m + 1), s^2 < 0.0295, its series to s^9 (truncation 3e-10).
inline V16 log16(V16 x) {
  const V16 one = set1(1.0f);
  const Binary b = split_binary(x);
  const V16 s = div(sub(b.m, one), add(b.m, one)), z = mul(s, s);
  V16 series = set1(0x1.c71c72p-3f);              // 2/9
  series = fma(series, z, set1(0x1.24924ap-2f));  // 2/7
  series = fma(series, z, set1(0x1.99999ap-2f));  // 2/5
  series = fma(series, z, set1(0x1.555556p-1f));  // 2/3
  const V16 small = fma(mul(s, z), series, mul(b.n, set1(0x1.7f7d1cp-20f)));
  return fma(b.n, set1(0x1.62e4p-1f), add(add(s, s), small));
}
