// D8 / avx2: eight virtual fp64 lanes in two 256-bit registers. Same bits as base/vec64.h, operation by operation.
// Included inside an anonymous namespace, after vec.h and <immintrin.h>, <cstdint>, <cstring>.

struct D8 {
  __m256d lo, hi;  // lanes 0-3, 4-7
};

inline double fma64(double a, double b, double c) { return _mm_cvtsd_f64(_mm_fmadd_sd(_mm_set_sd(a), _mm_set_sd(b), _mm_set_sd(c))); }

inline D8 set1d(double a) { return {_mm256_set1_pd(a), _mm256_set1_pd(a)}; }
inline D8 load8(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
inline void store8(double* p, D8 a) {
  _mm256_storeu_pd(p, a.lo);
  _mm256_storeu_pd(p + 4, a.hi);
}
inline D8 add(D8 a, D8 b) { return {_mm256_add_pd(a.lo, b.lo), _mm256_add_pd(a.hi, b.hi)}; }
inline D8 sub(D8 a, D8 b) { return {_mm256_sub_pd(a.lo, b.lo), _mm256_sub_pd(a.hi, b.hi)}; }
inline D8 mul(D8 a, D8 b) { return {_mm256_mul_pd(a.lo, b.lo), _mm256_mul_pd(a.hi, b.hi)}; }
inline D8 fma(D8 a, D8 b, D8 c) { return {_mm256_fmadd_pd(a.lo, b.lo, c.lo), _mm256_fmadd_pd(a.hi, b.hi, c.hi)}; }
// Lane by lane: is bit `bit` of the representation of `bits` set ? yes : no. blendv looks at the top bit.
inline __m256d select_bit_half(__m256d bits, int bit, __m256d yes, __m256d no) {
  const __m256i top = _mm256_sll_epi64(_mm256_castpd_si256(bits), _mm_cvtsi32_si128(63 - bit));
  return _mm256_blendv_pd(no, yes, _mm256_castsi256_pd(top));
}
inline D8 select_bit(D8 bits, int bit, D8 yes, D8 no) {
  return {select_bit_half(bits.lo, bit, yes.lo, no.lo), select_bit_half(bits.hi, bit, yes.hi, no.hi)};
}
inline __m256d widen4(__m256 a, int half) { return _mm256_cvtps_pd(half == 0 ? _mm256_castps256_ps128(a) : _mm256_extractf128_ps(a, 1)); }
// Lanes 0-7 and 8-15, exactly.
inline D8 widen_low(V16 a) { return {widen4(a.lo, 0), widen4(a.lo, 1)}; }
inline D8 widen_high(V16 a) { return {widen4(a.hi, 0), widen4(a.hi, 1)}; }
// Folded 8 -> 4 -> 2 -> 1: lane j with lane j + half.
inline double fold_add(D8 a) {
  const __m256d v4 = _mm256_add_pd(a.lo, a.hi);
  const __m128d v2 = _mm_add_pd(_mm256_castpd256_pd128(v4), _mm256_extractf128_pd(v4, 1));
  return _mm_cvtsd_f64(_mm_add_sd(v2, _mm_unpackhi_pd(v2, v2)));
}
// The first n lanes, rounded to fp32.
inline void store_f32_n(float* p, D8 a, int n) {
  const __m256 f = _mm256_set_m128(_mm256_cvtpd_ps(a.hi), _mm256_cvtpd_ps(a.lo));
  if (n >= 8) return _mm256_storeu_ps(p, f);
  alignas(32) float buffer[8];
  _mm256_store_ps(buffer, f);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}
