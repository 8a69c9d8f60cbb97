// D8 / base: eight virtual fp64 lanes in plain C++. It defines the bits that avx2/vec64.h and avx512/vec64.h reproduce.
// Included inside an anonymous namespace, after vec.h and <emmintrin.h>, <cmath>, <cstdint>, <cstring>.

struct D8 {
  double lane[8];
};

inline double fma64(double a, double b, double c) { return std::fma(a, b, c); }  // a * b + c, one rounding

#define GLMX_LANES for (int i = 0; i < 8; ++i)

inline D8 set1d(double a) {
  D8 r;
  GLMX_LANES r.lane[i] = a;
  return r;
}
inline D8 load8(const double* p) {
  D8 r;
  GLMX_LANES r.lane[i] = p[i];
  return r;
}
inline void store8(double* p, D8 a) { GLMX_LANES p[i] = a.lane[i]; }
inline D8 add(D8 a, D8 b) {
  GLMX_LANES a.lane[i] = a.lane[i] + b.lane[i];
  return a;
}
inline D8 sub(D8 a, D8 b) {
  GLMX_LANES a.lane[i] = a.lane[i] - b.lane[i];
  return a;
}
inline D8 mul(D8 a, D8 b) {
  GLMX_LANES a.lane[i] = a.lane[i] * b.lane[i];
  return a;
}
inline D8 fma(D8 a, D8 b, D8 c) {
  GLMX_LANES c.lane[i] = std::fma(a.lane[i], b.lane[i], c.lane[i]);
  return c;
}
// Lane by lane: is bit `bit` of the representation of `bits` set ? yes : no.
inline D8 select_bit(D8 bits, int bit, D8 yes, D8 no) {
  GLMX_LANES {
    uint64_t word;
    std::memcpy(&word, &bits.lane[i], 8);
    no.lane[i] = ((word >> bit) & 1u) != 0 ? yes.lane[i] : no.lane[i];
  }
  return no;
}
// Lanes 0-7 and 8-15, exactly.
inline D8 widen_low(V16 a) {
  D8 r;
  GLMX_LANES r.lane[i] = static_cast<double>(a.lane[i]);
  return r;
}
inline D8 widen_high(V16 a) {
  D8 r;
  GLMX_LANES r.lane[i] = static_cast<double>(a.lane[i + 8]);
  return r;
}
// Folded 8 -> 4 -> 2 -> 1: lane j with lane j + half.
inline double fold_add(D8 a) {
  for (int half = 4; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.lane[i] = a.lane[i] + a.lane[i + half];
  return a.lane[0];
}
// The first n lanes, rounded to fp32.
inline void store_f32_n(float* p, D8 a, int n) {
  for (int i = 0; i < n && i < 8; ++i) p[i] = static_cast<float>(a.lane[i]);
}
#undef GLMX_LANES
