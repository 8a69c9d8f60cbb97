// fp64 functions from +, *, /, fma and bit moves alone: one series for every ISA, the same bits on each. Never libm.
// Included after vec64.h, inside its anonymous namespace.
#pragma once

inline uint64_t bits_of(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  return bits;
}
inline double from_bits(uint64_t bits) {
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}

constexpr double kLn2High = 0x1.62e42fefa39efp-1, kLn2Low = 0x1.abc9e3b39803fp-56;

// Natural logarithm of a normal x > 0, within 1.5 ulp; +inf and NaN are returned as they are.
// x = m 2^e with m in [sqrt(1/2), sqrt(2)); ln m = 2 atanh(s), s = (m - 1) / (m + 1), s^2 < 0.0295, its series to s^23.
inline double log64(double x) {
  if (!(x <= 0x1.fffffffffffffp+1023)) return x;
  constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcdu;
  const int64_t e = static_cast<int64_t>(bits_of(x) - kSqrtHalf) >> 52;
  const double m = from_bits(bits_of(x) - (static_cast<uint64_t>(e) << 52));
  const double s = (m - 1.0) / (m + 1.0), z = s * s;
  double series = 2.0 / 23.0;
  for (int k = 21; k >= 3; k -= 2) series = fma64(series, z, 2.0 / k);
  const double n = static_cast<double>(e);
  const double low = fma64(n, kLn2Low, s * z * series);
  return fma64(n, kLn2High, fma64(2.0, s, low));
}

// e^x for |x| < 700, within 2 ulp. x = n ln2 + r, |r| <= ln2 / 2; Taylor series to r^13 (remainder 4e-18).
inline double exp64(double x) {
  constexpr double kMagic = 0x1.8p+52;  // adding and taking it rounds to a whole number
  const double n = fma64(x, 0x1.71547652b82fep+0, kMagic) - kMagic;
  const double r = fma64(n, -kLn2Low, fma64(n, -kLn2High, x));
  double y = 1.0;
  for (int k = 13; k >= 1; --k) y = fma64(y * r, 1.0 / k, 1.0);
  return y * from_bits(static_cast<uint64_t>(static_cast<int64_t>(n) + 1023) << 52);
}
