// Stored values -> fp32 / avx512: sixteen or thirty-two of a row, exact. Included after vec.h.

inline __m128i load_16_bytes(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

inline V16 load_int8(const uint8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_16_bytes(p)))}; }

// Exponent and fraction move up to fp32's places; the bias grows by 120. What has exponent 0 is a fraction alone: a number of 2^-9.
inline V16 load_e4m3(const uint8_t* p) {
  const __m512i byte = _mm512_cvtepu8_epi32(load_16_bytes(p)), magnitude = _mm512_and_si512(byte, _mm512_set1_epi32(0x7f));
  const __m512i normal = _mm512_add_epi32(_mm512_slli_epi32(magnitude, 20), _mm512_set1_epi32(120 << 23));
  const __m512 small = _mm512_mul_ps(_mm512_cvtepi32_ps(magnitude), _mm512_set1_ps(0x1p-9f));
  const __mmask16 is_small = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(8));
  const __mmask16 is_nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7f));
  __m512i bits = _mm512_mask_blend_epi32(is_small, normal, _mm512_castps_si512(small));
  bits = _mm512_mask_blend_epi32(is_nan, bits, _mm512_set1_epi32(0x7fc00000));
  return {_mm512_castsi512_ps(_mm512_or_si512(bits, _mm512_slli_epi32(_mm512_sub_epi32(byte, magnitude), 24)))};
}

// The 32 values of 16 bytes.
inline void load_int4(const uint8_t* p, V16& first, V16& second) {
  const __m128i bytes = load_16_bytes(p), low = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(bytes, low), odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), low);
  const auto sixteen = [](__m128i nibbles) {
    return V16{_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(nibbles), _mm512_set1_epi32(8)))};
  };
  first = sixteen(_mm_unpacklo_epi8(even, odd)), second = sixteen(_mm_unpackhi_epi8(even, odd));
}
