// V16 / avx512: sixteen fp32 lanes in one 512-bit register. Same bits as base/vec.h, operation by operation.
// Included inside an anonymous namespace, after <immintrin.h>, <cstdint>, <cstring>.

struct V16 {
  __m512 v;
};

inline V16 set1(float a) { return {_mm512_set1_ps(a)}; }
inline V16 zero() { return {_mm512_setzero_ps()}; }

inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1u); }

inline V16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline V16 load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
inline void store(float* p, V16 a) { _mm512_storeu_ps(p, a.v); }
inline void store_n(float* p, V16 a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }

inline __m512 widen_bf16(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
// The rounded bf16 of each lane in the upper half of its 32 bits. NaN stays NaN (quiet bit set).
// Not vcvtneps2bf16: it is a separate feature, and integer rounding is the same on every ISA.
inline __m512i round_bits(__m512 a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i even = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_mask_or_epi32(even, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_and_si512(rounded, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
}
inline __m256i narrow_bf16(V16 a) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bits(a.v), 16)); }

inline V16 load(const uint16_t* p) { return {widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline V16 load_n(const uint16_t* p, int n) { return {widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p))}; }
inline void store(uint16_t* p, V16 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a)); }
inline void store_n(uint16_t* p, V16 a, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_bf16(a)); }
inline V16 round_bf16(V16 a) { return {_mm512_castsi512_ps(round_bits(a.v))}; }

inline V16 add(V16 a, V16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline V16 sub(V16 a, V16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline V16 mul(V16 a, V16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline V16 div(V16 a, V16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline V16 fma(V16 a, V16 b, V16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
inline V16 sqrt(V16 a) { return {_mm512_sqrt_ps(a.v)}; }
// a < b ? yes : no. False for NaN.
inline V16 select_lt(V16 a, V16 b, V16 yes, V16 no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
// Bit i: lane i of a == lane i of b. False for NaN.
inline uint32_t mask_eq(V16 a, V16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
inline V16 set_lane(V16 a, int lane, float value) {
  return {_mm512_mask_blend_ps(static_cast<__mmask16>(1u << lane), a.v, _mm512_set1_ps(value))};
}
// Bit i: a < b in lane i. False for NaN.
inline uint32_t mask_lt(V16 a, V16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
// The elements of `from` whose bits are set, side by side; `to` is not behind `from`, and 16 elements of it may be written.
template <class T>
inline void compress(const T* from, uint32_t mask, T* to) {
  static_assert(sizeof(T) == 4);
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), _mm512_loadu_si512(from)));
}
// a < b ? b : a. The instruction gives its second operand unless the first is larger.
inline V16 max(V16 a, V16 b) { return {_mm512_max_ps(b.v, a.v)}; }
// 2^a for whole numbers a in [-126, 127].
inline V16 pow2(V16 a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvttps_epi32(a.v), _mm512_set1_epi32(127)), 23))};
}
// x = m * 2^n with m in [sqrt(1/2), sqrt(2)), for normal x > 0; any bits for other x.
struct Binary {
  V16 m, n;
};
inline Binary split_binary(V16 x) {
  const __m512i bits = _mm512_castps_si512(x.v), exponent = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f3504f3)), 23);
  return {{_mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(exponent, 23)))}, {_mm512_cvtepi32_ps(exponent)}};
}
// Lanes 2j and 2j + 1 exchanged.
inline V16 swap_neighbours(V16 a) { return {_mm512_permute_ps(a.v, 0xb1)}; }

// Folded 16 -> 8 -> 4 -> 2 -> 1: lane j with lane j + half.
inline float fold_add(V16 a) {
  const __m256 v8 = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 v4 = _mm_add_ps(_mm256_castps256_ps128(v8), _mm256_extractf128_ps(v8, 1));
  const __m128 v2 = _mm_add_ps(v4, _mm_movehl_ps(v4, v4));
  return _mm_cvtss_f32(_mm_add_ss(v2, _mm_shuffle_ps(v2, v2, 1)));
}
inline float fold_max(V16 a) {
  const __m256 v8 = _mm256_max_ps(_mm512_extractf32x8_ps(a.v, 1), _mm512_castps512_ps256(a.v));
  const __m128 v4 = _mm_max_ps(_mm256_extractf128_ps(v8, 1), _mm256_castps256_ps128(v8));
  const __m128 v2 = _mm_max_ps(_mm_movehl_ps(v4, v4), v4);
  return _mm_cvtss_f32(_mm_max_ss(_mm_shuffle_ps(v2, v2, 1), v2));
}
