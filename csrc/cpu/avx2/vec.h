// V16 / avx2: sixteen virtual fp32 lanes in two 256-bit registers. Same bits as base/vec.h, operation by operation.
// Included inside an anonymous namespace, after <immintrin.h>, <cstdint>, <cstring>.

struct V16 {
  __m256 lo, hi;  // lanes 0-7, 8-15
};

inline V16 set1(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline V16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }

inline __m256i first_lanes(int n) {  // all ones in lanes below n
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline V16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
// Masked stores are microcoded on some CPUs (AMD): full vectors, which most are, take the plain ones.
inline V16 load_n(const float* p, int n) {
  if (n >= 16) return load(p);
  return {_mm256_maskload_ps(p, first_lanes(n)), _mm256_maskload_ps(p + 8, first_lanes(n - 8))};
}
inline void store(float* p, V16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline void store_n(float* p, V16 a, int n) {
  if (n >= 16) return store(p, a);
  _mm256_maskstore_ps(p, first_lanes(n), a.lo);
  _mm256_maskstore_ps(p + 8, first_lanes(n - 8), a.hi);
}

inline __m256 widen_bf16(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
// The rounded bf16 of each lane in the upper half of its 32 bits. NaN stays NaN (quiet bit set).
inline __m256i round_bits(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i even = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_and_si256(_mm256_blendv_epi8(even, quiet, nan), _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
}
inline __m256i narrow_bf16(V16 a) {
  const __m256i lo = _mm256_srli_epi32(round_bits(a.lo), 16), hi = _mm256_srli_epi32(round_bits(a.hi), 16);
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8);
}

inline V16 load(const uint16_t* p) {
  return {widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline V16 load_n(const uint16_t* p, int n) {  // there is no 16-bit mask load: the tail is copied, and computed by the same code
  if (n >= 16) return load(p);
  alignas(32) uint16_t buffer[16] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
inline void store(uint16_t* p, V16 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a)); }
inline void store_n(uint16_t* p, V16 a, int n) {
  if (n >= 16) return store(p, a);
  alignas(32) uint16_t buffer[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(buffer), narrow_bf16(a));
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}
inline V16 round_bf16(V16 a) { return {_mm256_castsi256_ps(round_bits(a.lo)), _mm256_castsi256_ps(round_bits(a.hi))}; }

inline V16 add(V16 a, V16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline V16 sub(V16 a, V16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline V16 mul(V16 a, V16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline V16 div(V16 a, V16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline V16 fma(V16 a, V16 b, V16 c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }  // a * b + c
inline V16 sqrt(V16 a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
// a < b ? yes : no. False for NaN.
inline V16 select_lt(V16 a, V16 b, V16 yes, V16 no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
// Bit i: lane i of a == lane i of b. False for NaN.
inline uint32_t mask_eq(V16 a, V16 b) {
  const uint32_t lo = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ)));
  const uint32_t hi = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ)));
  return lo | hi << 8;
}
inline V16 set_lane(V16 a, int lane, float value) {
  const __m256i iota = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256 lo = _mm256_castsi256_ps(_mm256_cmpeq_epi32(iota, _mm256_set1_epi32(lane)));
  const __m256 hi = _mm256_castsi256_ps(_mm256_cmpeq_epi32(iota, _mm256_set1_epi32(lane - 8)));
  return {_mm256_blendv_ps(a.lo, _mm256_set1_ps(value), lo), _mm256_blendv_ps(a.hi, _mm256_set1_ps(value), hi)};
}
// Bit i: a < b in lane i. False for NaN.
inline uint32_t mask_lt(V16 a, V16 b) {
  const int lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)), hi = _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ));
  return static_cast<uint32_t>(lo | hi << 8);
}
// The elements of `from` whose bits are set, side by side; `to` is not behind `from`, and 16 elements of it may be written.
template <class T>
inline void compress(const T* from, uint32_t mask, T* to) {
  for (; mask != 0; mask &= mask - 1) *to++ = from[__builtin_ctz(mask)];
}
// a < b ? b : a. The instruction gives its second operand unless the first is larger.
inline V16 max(V16 a, V16 b) { return {_mm256_max_ps(b.lo, a.lo), _mm256_max_ps(b.hi, a.hi)}; }
// 2^a for whole numbers a in [-126, 127].
inline __m256 pow2_half(__m256 a) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvttps_epi32(a), _mm256_set1_epi32(127)), 23));
}
inline V16 pow2(V16 a) { return {pow2_half(a.lo), pow2_half(a.hi)}; }
// x = m * 2^n with m in [sqrt(1/2), sqrt(2)), for normal x > 0; any bits for other x.
struct Binary {
  V16 m, n;
};
inline void split_binary_half(__m256 x, __m256* m, __m256* n) {
  const __m256i bits = _mm256_castps_si256(x), exponent = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3)), 23);
  *m = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(exponent, 23)));
  *n = _mm256_cvtepi32_ps(exponent);
}
inline Binary split_binary(V16 x) {
  Binary r;
  split_binary_half(x.lo, &r.m.lo, &r.n.lo);
  split_binary_half(x.hi, &r.m.hi, &r.n.hi);
  return r;
}
// Lanes 2j and 2j + 1 exchanged.
inline V16 swap_neighbours(V16 a) { return {_mm256_permute_ps(a.lo, 0xb1), _mm256_permute_ps(a.hi, 0xb1)}; }

// Folded 16 -> 8 -> 4 -> 2 -> 1: lane j with lane j + half.
inline float fold_add(V16 a) {
  const __m256 v8 = _mm256_add_ps(a.lo, a.hi);
  const __m128 v4 = _mm_add_ps(_mm256_castps256_ps128(v8), _mm256_extractf128_ps(v8, 1));
  const __m128 v2 = _mm_add_ps(v4, _mm_movehl_ps(v4, v4));
  return _mm_cvtss_f32(_mm_add_ss(v2, _mm_shuffle_ps(v2, v2, 1)));
}
inline float fold_max(V16 a) {
  const __m256 v8 = _mm256_max_ps(a.hi, a.lo);
  const __m128 v4 = _mm_max_ps(_mm256_extractf128_ps(v8, 1), _mm256_castps256_ps128(v8));
  const __m128 v2 = _mm_max_ps(_mm_movehl_ps(v4, v4), v4);
  return _mm_cvtss_f32(_mm_max_ss(_mm_shuffle_ps(v2, v2, 1), v2));
}
