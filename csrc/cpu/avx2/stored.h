// Stored values -> fp32 / avx2: sixteen or thirty-two of a row, exact. Included after vec.h.

inline __m256i load_8_bytes(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }

inline V16 load_int8(const uint8_t* p) {
  const auto half = [](const uint8_t* q) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q))));
  };
  return {half(p), half(p + 8)};
}

// Exponent and fraction move up to fp32's places; the bias grows by 120. What has exponent 0 is a fraction alone: a number of 2^-9.
inline V16 load_e4m3(const uint8_t* p) {
  const auto half = [](const uint8_t* q) {
    const __m256i byte = load_8_bytes(q), magnitude = _mm256_and_si256(byte, _mm256_set1_epi32(0x7f));
    const __m256i normal = _mm256_add_epi32(_mm256_slli_epi32(magnitude, 20), _mm256_set1_epi32(120 << 23));
    const __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(magnitude), _mm256_set1_ps(0x1p-9f));
    const __m256i is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude);
    const __m256i is_nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f));
    __m256i bits = _mm256_blendv_epi8(normal, _mm256_castps_si256(small), is_small);
    bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7fc00000), is_nan);
    return _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_slli_epi32(_mm256_sub_epi32(byte, magnitude), 24)));
  };
  return {half(p), half(p + 8)};
}

// The 32 values of 16 bytes.
inline void load_int4(const uint8_t* p, V16& first, V16& second) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), low = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(bytes, low), odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), low);
  const auto eight = [](__m128i nibbles) {
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_cvtepu8_epi32(nibbles), _mm256_set1_epi32(8)));
  };
  const __m128i a = _mm_unpacklo_epi8(even, odd), b = _mm_unpackhi_epi8(even, odd);
  first = {eight(a), eight(_mm_unpackhi_epi64(a, a))};
  second = {eight(b), eight(_mm_unpackhi_epi64(b, b))};
}
