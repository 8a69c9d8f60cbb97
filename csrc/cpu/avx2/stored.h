// Stored values -> bf16 / avx2: 32 of a row. Included after vec.h.

// The upper halves of sixteen fp32: their bf16, where that is exact.
inline __m256i upper_halves(__m256 low, __m256 high) {
  const __m256i a = _mm256_srli_epi32(_mm256_castps_si256(low), 16), b = _mm256_srli_epi32(_mm256_castps_si256(high), 16);
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
}

inline void widen_int8(const uint8_t* p, uint16_t* out) {
  const auto eight = [](const uint8_t* q) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q))));
  };
  for (int i = 0; i < 32; i += 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), upper_halves(eight(p + i), eight(p + i + 8)));
  }
}

// bf16(value * scale) of the eight values of exponent 0, and of those of exponent 7, which are 1 to 1.875.
struct E4m3Table {
  __m256i small, one;
};

inline E4m3Table e4m3_table(V16 values, float) {
  const __m256i halves = narrow_bf16(values);
  return {_mm256_permute4x64_epi64(halves, 0x44), _mm256_permute4x64_epi64(halves, 0xee)};
}

// The other exponents' are those of 7 times a power of two.
inline void widen_e4m3(const uint8_t* p, const E4m3Table& table, uint16_t* out) {
  for (int i = 0; i < 32; i += 16) {
    const __m256i byte = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)));
    const __m256i magnitude = _mm256_and_si256(byte, _mm256_set1_epi16(0x7f)), fraction = _mm256_and_si256(byte, _mm256_set1_epi16(7));
    const __m256i place = _mm256_add_epi16(_mm256_mullo_epi16(fraction, _mm256_set1_epi16(0x202)), _mm256_set1_epi16(0x100));
    const __m256i exponent = _mm256_slli_epi16(_mm256_sub_epi16(_mm256_sub_epi16(magnitude, fraction), _mm256_set1_epi16(7 << 3)), 4);
    __m256i bits = _mm256_add_epi16(_mm256_shuffle_epi8(table.one, place), exponent);
    const __m256i is_small = _mm256_cmpgt_epi16(_mm256_set1_epi16(8), magnitude);
    bits = _mm256_blendv_epi8(bits, _mm256_shuffle_epi8(table.small, place), is_small);
    bits = _mm256_blendv_epi8(bits, _mm256_set1_epi16(0x7fc0), _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f)));
    bits = _mm256_xor_si256(bits, _mm256_slli_epi16(_mm256_sub_epi16(byte, magnitude), 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), bits);
  }
}

// The bf16 of each of the sixteen values, their lower and their upper bytes.
struct Int4Table {
  __m256i low, high;
};

inline Int4Table int4_table(V16 values) {
  const __m256i halves = narrow_bf16(values), bytes = _mm256_set1_epi16(0xff);
  const __m256i low = _mm256_and_si256(halves, bytes), high = _mm256_srli_epi16(halves, 8);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8);  // sixteen lower, sixteen upper
  return {_mm256_permute4x64_epi64(packed, 0x44), _mm256_permute4x64_epi64(packed, 0xee)};
}

inline void widen_int4(const uint8_t* p, const Int4Table& table, uint16_t* out) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), nibble = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(bytes, nibble), odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble);
  const __m256i at = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
  const __m256i low = _mm256_shuffle_epi8(table.low, at), high = _mm256_shuffle_epi8(table.high, at);
  const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute2x128_si256(a, b, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm256_permute2x128_si256(a, b, 0x31));
}
