// D8 / avx512: eight fp64 lanes in one 512-bit register. Same bits as base/vec64.h, operation by operation.
// Included inside an anonymous namespace, after <immintrin.h>, <cstdint>, <cstring>.

struct D8 {
  __m512d v;
};

inline double fma64(double a, double b, double c) { return _mm_cvtsd_f64(_mm_fmadd_sd(_mm_set_sd(a), _mm_set_sd(b), _mm_set_sd(c))); }

inline D8 set1d(double a) { return {_mm512_set1_pd(a)}; }
inline D8 load8(const double* p) { return {_mm512_loadu_pd(p)}; }
inline D8 add(D8 a, D8 b) { return {_mm512_add_pd(a.v, b.v)}; }
inline D8 sub(D8 a, D8 b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline D8 mul(D8 a, D8 b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline D8 fma(D8 a, D8 b, D8 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
// Lane by lane: is bit `bit` of the representation of `bits` set ? yes : no.
inline D8 select_bit(D8 bits, int bit, D8 yes, D8 no) {
  const __mmask8 set = _mm512_test_epi64_mask(_mm512_castpd_si512(bits.v), _mm512_set1_epi64(1LL << bit));
  return {_mm512_mask_blend_pd(set, no.v, yes.v)};
}
// The first n lanes, rounded to fp32.
inline void store_f32_n(float* p, D8 a, int n) {
  const __mmask8 keep = static_cast<__mmask8>(n >= 8 ? 0xff : (1u << n) - 1u);
  _mm256_mask_storeu_ps(p, keep, _mm512_cvtpd_ps(a.v));
}
