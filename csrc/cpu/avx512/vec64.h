// D8 / avx512: eight fp64 lanes in one 512-bit register. Same bits as base/vec64.h, operation by operation.
// Included inside an anonymous namespace, after vec.h and <immintrin.h>, <cstdint>, <cstring>.

struct D8 {
  __m512d v;
};

inline double fma64(double a, double b, double c) { return _mm_cvtsd_f64(_mm_fmadd_sd(_mm_set_sd(a), _mm_set_sd(b), _mm_set_sd(c))); }

inline D8 set1d(double a) { return {_mm512_set1_pd(a)}; }
inline D8 load8(const double* p) { return {_mm512_loadu_pd(p)}; }
inline void store8(double* p, D8 a) { _mm512_storeu_pd(p, a.v); }
inline D8 add(D8 a, D8 b) { return {_mm512_add_pd(a.v, b.v)}; }
inline D8 sub(D8 a, D8 b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline D8 mul(D8 a, D8 b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline D8 fma(D8 a, D8 b, D8 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
// Lane by lane: is bit `bit` of the representation of `bits` set ? yes : no.
inline D8 select_bit(D8 bits, int bit, D8 yes, D8 no) {
  const __mmask8 set = _mm512_test_epi64_mask(_mm512_castpd_si512(bits.v), _mm512_set1_epi64(1LL << bit));
  return {_mm512_mask_blend_pd(set, no.v, yes.v)};
}
// Lanes 0-7 and 8-15, exactly.
inline D8 widen_low(V16 a) { return {_mm512_cvtps_pd(_mm512_castps512_ps256(a.v))}; }
inline D8 widen_high(V16 a) { return {_mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1))}; }
// Folded 8 -> 4 -> 2 -> 1: lane j with lane j + half.
inline double fold_add(D8 a) {
  const __m256d v4 = _mm256_add_pd(_mm512_castpd512_pd256(a.v), _mm512_extractf64x4_pd(a.v, 1));
  const __m128d v2 = _mm_add_pd(_mm256_castpd256_pd128(v4), _mm256_extractf128_pd(v4, 1));
  return _mm_cvtsd_f64(_mm_add_sd(v2, _mm_unpackhi_pd(v2, v2)));
}
// The first n lanes, rounded to fp32.
inline void store_f32_n(float* p, D8 a, int n) {
  const __mmask8 keep = static_cast<__mmask8>(n >= 8 ? 0xff : (1u << n) - 1u);
  _mm256_mask_storeu_ps(p, keep, _mm512_cvtpd_ps(a.v));
}
