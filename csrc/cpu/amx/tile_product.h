// Operands of tile products: how they are packed, and the product of one or two left tiles with one or two right tiles over a depth.
// A left tile is 16 rows x 32 depth, row-major; a right tile 16 pairs of depth x 16 columns. Packed tiles are zeros beyond their rows,
// columns and depth, so there is one tile configuration, and padding adds what the vector kernels' tree adds.
// Included after avx512/vec.h, avx512/transpose.h, cpu/inl/sizes.inl and tile.h, inside an anonymous namespace.
#pragma once

constexpr int64_t kTile = 16 * 32;  // elements of an operand tile: 1 KB

// The tile unit, while a work item runs.
struct TileSession {
  TileSession() {
    TileConfig config;  // 16 rows x 64 bytes each, the largest
    for (int t = 0; t < 8; ++t) {
      config.rows[t] = 16;
      config.row_bytes[t] = 64;
    }
    tile_configure(config);
  }
  ~TileSession() { tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

inline uint16_t* as_halves(void* p) { return static_cast<uint16_t*>(p); }

// 16 rows of 32, contiguous in depth -> a left tile.
template <class Row>
inline void copy_left_tile(Row row, int64_t rows, int64_t depth, uint16_t* out) {
  for (int64_t i = 0; i < 16; ++i) {
    const __mmask32 valid = i >= rows ? 0 : depth >= 32 ? 0xffffffffu : (1u << depth) - 1u;
    _mm512_storeu_si512(out + i * 32, valid == 0 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(valid, row(i)));
  }
}

// The same rows -> a right tile: pairs of depth, transposed.
template <class Row>
inline void transpose_right_tile(Row row, int64_t cols, int64_t depth, uint16_t* out) {
  copy_left_tile(row, cols, depth, out);
  __m512i pairs[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) pairs[i] = _mm512_loadu_si512(out + i * 32);
  transpose_16x16(pairs);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * 32, pairs[i]);
}

// `depth` rows of up to 16 columns, contiguous in columns -> a right tile: two rows interleaved.
template <class Row>
inline void interleave_right_tile(Row row, int64_t cols, int64_t depth, uint16_t* out) {
  const __mmask16 valid = first_lanes(static_cast<int>(cols));
  const auto load_row = [&](int64_t k) {
    return k < depth ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, row(k))) : _mm512_setzero_si512();
  };
  for (int64_t k = 0; k < 32; k += 2) {
    _mm512_storeu_si512(out + k * 16, _mm512_or_si512(load_row(k), _mm512_slli_epi32(load_row(k + 1), 16)));
  }
}

// The same rows -> a left tile.
template <class Row>
inline void transpose_left_tile(Row row, int64_t rows, int64_t depth, uint16_t* out) {
  interleave_right_tile(row, rows, depth, out);
  __m512i pairs[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) pairs[i] = _mm512_loadu_si512(out + i * 32);
  transpose_16x16(pairs);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * 32, pairs[i]);
}

// Left rows over some steps of 32 depth: `in_place` whole tiles at `at`, the rest packed as [steps][2][kTile].
struct Left {
  const uint16_t* at;
  int64_t stride, in_place;
  const uint16_t* packed;
};

// c [16 * lefts][16 * rights] += left @ right tiles [steps][kTile], right1 behind right0. first: c starts from zero.
template <int lefts, int rights>
inline void tile_product(const Left& left, const uint16_t* right0, const uint16_t* right1, int64_t steps, bool first, float* c,
                         int64_t ldc) {
  const int64_t row_bytes = ldc * 4;
  if (first) {
    tile_zero<0>();
    if constexpr (lefts == 2) tile_zero<1>();
    if constexpr (rights == 2) tile_zero<2>();
    if constexpr (lefts == 2 && rights == 2) tile_zero<3>();
  } else {
    tile_load<0>(c, row_bytes);
    if constexpr (lefts == 2) tile_load<1>(c + 16 * ldc, row_bytes);
    if constexpr (rights == 2) tile_load<2>(c + 16, row_bytes);
    if constexpr (lefts == 2 && rights == 2) tile_load<3>(c + 16 * ldc + 16, row_bytes);
  }
  for (int64_t b = 0; b < steps; ++b) {
    if (b < left.in_place) {
      tile_load<4>(left.at + b * 32, left.stride * 2);
      if constexpr (lefts == 2) tile_load<5>(left.at + 16 * left.stride + b * 32, left.stride * 2);
    } else {
      tile_load<4>(left.packed + 2 * b * kTile, 64);
      if constexpr (lefts == 2) tile_load<5>(left.packed + (2 * b + 1) * kTile, 64);
    }
    tile_load<6>(right0 + b * kTile, 64);
    tile_dot<0, 4, 6>();
    if constexpr (lefts == 2) tile_dot<1, 5, 6>();
    if constexpr (rights == 2) {
      tile_load<7>(right1 + b * kTile, 64);
      tile_dot<2, 4, 7>();
      if constexpr (lefts == 2) tile_dot<3, 5, 7>();
    }
  }
  tile_store<0>(c, row_bytes);
  if constexpr (lefts == 2) tile_store<1>(c + 16 * ldc, row_bytes);
  if constexpr (rights == 2) tile_store<2>(c + 16, row_bytes);
  if constexpr (lefts == 2 && rights == 2) tile_store<3>(c + 16 * ldc + 16, row_bytes);
}

// The same for counts of rows and columns that are known when it runs: up to 32 of each.
inline void tile_product_of(int64_t rows, int64_t cols, const Left& left, const uint16_t* right0, const uint16_t* right1, int64_t steps,
                            bool first, float* c, int64_t ldc) {
  if (rows > 16 && cols > 16) return tile_product<2, 2>(left, right0, right1, steps, first, c, ldc);
  if (rows > 16) return tile_product<2, 1>(left, right0, right1, steps, first, c, ldc);
  if (cols > 16) return tile_product<1, 2>(left, right0, right1, steps, first, c, ldc);
  tile_product<1, 1>(left, right0, right1, steps, first, c, ldc);
}

// A 16 x 16 block of fp32, transposed.
inline void transpose_results(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m512i block[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) block[i] = _mm512_loadu_si512(from + i * from_stride);
  transpose_16x16(block);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * to_stride, block[i]);
}
