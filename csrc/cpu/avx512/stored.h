// Stored values -> bf16 / avx512: 32 of a row. Included after vec.h.

alignas(64) constexpr uint16_t kUpperHalves[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                   33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};

inline void widen_int8(const uint8_t* p, uint16_t* out) {
  const auto sixteen = [](const uint8_t* q) {
    return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)))));
  };
  _mm512_storeu_si512(out, _mm512_permutex2var_epi16(sixteen(p), _mm512_load_si512(kUpperHalves), sixteen(p + 16)));
}

// bf16(value * scale) of the eight values of exponent 0, then of those of exponent 7, which are 1 to 1.875.
struct E4m3Table {
  __m512i at;
};

inline E4m3Table e4m3_table(V16 values, float) { return {_mm512_castsi256_si512(narrow_bf16(values))}; }

// The other exponents' are those of 7 times a power of two.
inline void widen_e4m3(const uint8_t* p, const E4m3Table& table, uint16_t* out) {
  const __m512i byte = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const __m512i magnitude = _mm512_and_si512(byte, _mm512_set1_epi16(0x7f)), fraction = _mm512_and_si512(byte, _mm512_set1_epi16(7));
  const __m512i exponent = _mm512_slli_epi16(_mm512_sub_epi16(_mm512_sub_epi16(magnitude, fraction), _mm512_set1_epi16(7 << 3)), 4);
  __m512i bits = _mm512_permutexvar_epi16(_mm512_add_epi16(fraction, _mm512_set1_epi16(8)), table.at);
  const __mmask32 is_small = _mm512_cmplt_epi16_mask(magnitude, _mm512_set1_epi16(8));
  bits = _mm512_mask_permutexvar_epi16(_mm512_add_epi16(bits, exponent), is_small, fraction, table.at);
  bits = _mm512_mask_mov_epi16(bits, _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f)), _mm512_set1_epi16(0x7fc0));
  bits = _mm512_xor_si512(bits, _mm512_slli_epi16(_mm512_sub_epi16(byte, magnitude), 8));
  _mm512_storeu_si512(out, bits);
}

// The bf16 of each of the sixteen values, twice: bit 4 of an index is another value's.
struct Int4Table {
  __m512i twice;
};

inline Int4Table int4_table(V16 values) { return {_mm512_broadcast_i64x4(narrow_bf16(values))}; }

inline void widen_int4(const uint8_t* p, const Int4Table& table, uint16_t* out) {
  const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m512i at = _mm512_or_si512(byte, _mm512_slli_epi32(byte, 12));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(at, table.twice));
}
