// transpose_16x32 / avx512: 16 rows of 32 elements -> 32 rows of 16 fp32, in 16x16 blocks of 32 bits. Included after vec.h.

[[gnu::always_inline]] inline void transpose_16x16(__m512i (&r)[16]) {
  __m512i a[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // pairs of rows
    a[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // fours of rows: r[4i + c] holds column 4q + c in its quarter q
    r[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {  // eights of rows: quarters (0, 2) and (1, 3)
    a[c] = _mm512_shuffle_i32x4(r[c], r[c + 4], 0x88);
    a[c + 4] = _mm512_shuffle_i32x4(r[c], r[c + 4], 0xdd);
    a[c + 8] = _mm512_shuffle_i32x4(r[c + 8], r[c + 12], 0x88);
    a[c + 12] = _mm512_shuffle_i32x4(r[c + 8], r[c + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    r[c] = _mm512_shuffle_i32x4(a[c], a[c + 8], 0x88);
    r[c + 4] = _mm512_shuffle_i32x4(a[c + 4], a[c + 12], 0x88);
    r[c + 8] = _mm512_shuffle_i32x4(a[c], a[c + 8], 0xdd);
    r[c + 12] = _mm512_shuffle_i32x4(a[c + 4], a[c + 12], 0xdd);
  }
}

// out[k * out_stride + lane] = p[lane * stride + k]
inline void transpose_16x32(const float* p, int64_t stride, float* out, int64_t out_stride) {
  for (int k = 0; k < 32; k += 16) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(p + i * stride + k);
    transpose_16x16(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + (k + i) * out_stride, r[i]);
  }
}

// bf16 travels as pairs (k, k + 1) of 32 bits, and is split into its even and odd k on the way out.
inline void transpose_16x32(const uint16_t* p, int64_t stride, float* out, int64_t out_stride) {
  const __m512i odd = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  __m512i r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(p + i * stride);
  transpose_16x16(r);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    _mm512_storeu_si512(out + 2 * i * out_stride, _mm512_slli_epi32(r[i], 16));
    _mm512_storeu_si512(out + (2 * i + 1) * out_stride, _mm512_and_si512(r[i], odd));
  }
}

// One block of the GEMM tree: c[i] += (fused chain over even k) + (over odd k) of a[i * 32 + k] with 16 rows of 32 k at p, which go
// from memory through the transpose to the FMAs without a stop.
template <int rows>
inline void dot_16x32(const uint16_t* p, int64_t stride, const float* a, V16* c) {
  const __m512i odd = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  __m512i r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(p + i * stride);
  transpose_16x16(r);
  __m512 chain[2][rows];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) chain[0][i] = chain[1][i] = _mm512_setzero_ps();
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) {
    const __m512 w0 = _mm512_castsi512_ps(_mm512_slli_epi32(r[k], 16)), w1 = _mm512_castsi512_ps(_mm512_and_si512(r[k], odd));
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      chain[0][i] = _mm512_fmadd_ps(_mm512_set1_ps(a[i * 32 + 2 * k]), w0, chain[0][i]);
      chain[1][i] = _mm512_fmadd_ps(_mm512_set1_ps(a[i * 32 + 2 * k + 1]), w1, chain[1][i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) c[i].v = _mm512_add_ps(c[i].v, _mm512_add_ps(chain[0][i], chain[1][i]));
}

template <int rows>
inline void dot_16x32(const float* p, int64_t stride, const float* a, V16* c) {
  __m512 chain[2][rows];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) chain[0][i] = chain[1][i] = _mm512_setzero_ps();
  for (int half = 0; half < 32; half += 16) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(p + i * stride + half);
    transpose_16x16(r);
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) {
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        chain[k % 2][i] = _mm512_fmadd_ps(_mm512_set1_ps(a[i * 32 + half + k]), _mm512_castsi512_ps(r[k]), chain[k % 2][i]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) c[i].v = _mm512_add_ps(c[i].v, _mm512_add_ps(chain[0][i], chain[1][i]));
}
