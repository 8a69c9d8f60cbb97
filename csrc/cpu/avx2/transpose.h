// transpose_16x32 / avx2: 16 rows of 32 elements -> 32 rows of 16 fp32, in 8x8 blocks of 32 bits. Included after vec.h.

[[gnu::always_inline]] inline void transpose_8x8(__m256 (&r)[8]) {
  __m256 a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // pairs of rows
    a[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {  // fours of rows
    b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
    b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
    b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
    b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // halves
    r[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

// out[k * out_stride + lane] = p[lane * stride + k]
inline void transpose_16x32(const float* p, int64_t stride, float* out, int64_t out_stride) {
  for (int lane = 0; lane < 16; lane += 8) {
    for (int k = 0; k < 32; k += 8) {
      __m256 r[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(p + (lane + i) * stride + k);
      transpose_8x8(r);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) _mm256_storeu_ps(out + (k + i) * out_stride + lane, r[i]);
    }
  }
}

// bf16 travels as pairs (k, k + 1) of 32 bits, and is split into its even and odd k on the way out.
inline void transpose_16x32(const uint16_t* p, int64_t stride, float* out, int64_t out_stride) {
  const __m256i odd = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  for (int lane = 0; lane < 16; lane += 8) {
    for (int k = 0; k < 32; k += 16) {
      __m256 r[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i)
        r[i] = _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + (lane + i) * stride + k)));
      transpose_8x8(r);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const __m256i pair = _mm256_castps_si256(r[i]);
        float* row = out + (k + 2 * i) * out_stride + lane;
        _mm256_storeu_ps(row, _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)));
        _mm256_storeu_ps(row + out_stride, _mm256_castsi256_ps(_mm256_and_si256(pair, odd)));
      }
    }
  }
}

// One block of the GEMM tree: c[i] += (fused chain over even k) + (over odd k) of a[i * 32 + k] with 16 rows of 32 k at p, which go
// from memory through the transpose to the FMAs without a stop.
template <int rows, class T>
inline void dot_16x32(const T* p, int64_t stride, const float* a, V16* c) {
  constexpr int kWide = 32 / static_cast<int>(sizeof(T));  // elements of a register: 16 bf16 (8 pairs of k) or 8 fp32
  const __m256i odd = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
#pragma GCC unroll 2
  for (int lane = 0; lane < 16; lane += 8) {
    __m256 chain[2][rows];
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) chain[0][i] = chain[1][i] = _mm256_setzero_ps();
    for (int k0 = 0; k0 < 32; k0 += kWide) {
      __m256 r[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(p + (lane + i) * stride + k0));
      transpose_8x8(r);
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) {
        const __m256i pair = _mm256_castps_si256(r[k]);
#pragma GCC unroll 8
        for (int i = 0; i < rows; ++i) {
          const float* x = a + i * 32 + k0;
          if constexpr (sizeof(T) == 2) {
            chain[0][i] = _mm256_fmadd_ps(_mm256_set1_ps(x[2 * k]), _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)), chain[0][i]);
            chain[1][i] = _mm256_fmadd_ps(_mm256_set1_ps(x[2 * k + 1]), _mm256_castsi256_ps(_mm256_and_si256(pair, odd)), chain[1][i]);
          } else {
            chain[k % 2][i] = _mm256_fmadd_ps(_mm256_set1_ps(x[k]), r[k], chain[k % 2][i]);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      __m256& half = lane == 0 ? c[i].lo : c[i].hi;
      half = _mm256_add_ps(half, _mm256_add_ps(chain[0][i], chain[1][i]));
    }
  }
}
