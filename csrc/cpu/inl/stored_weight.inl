// The forward of grouped_gemm with weights as a checkpoint stores them (StoredWeights of ops.h): values of 4 or 8 bits become bf16 in L1,
// 16 rows x 128 columns at a time, and from there on the product is that of bf16 weights.
// Included by grouped_gemm.inl.
#pragma once
#include "cpu/inl/stored_matrix.inl"

// sums [n][16] += rows of a tile, one block of 32, @ 16 rows of w.
template <int rows = kRows>
void dot_rows_n(int64_t n, const uint16_t* w, int64_t stride, const float* a, float* sums) {
  if constexpr (rows > 1) {
    if (n < rows) return dot_rows_n<rows - 1>(n, w, stride, a, sums);
  }
  V16 c[rows];
  for (int i = 0; i < rows; ++i) c[i] = load(sums + 16 * i);
  dot_16x32<rows>(w, stride, a, c);
  for (int i = 0; i < rows; ++i) store(sums + 16 * i, c[i]);
}

// As tile_times_rows, for tiles `tile_words` apart: c [rows][ldc] = the tiles' rows @ rows [row, row + cols) of m.
template <StoredFormat format>
void tiles_times_stored(const StoredMatrix& m, int64_t rows, float* tiles, int64_t tile_words, int64_t row, int64_t cols, float* c,
                        int64_t ldc, const uint8_t* next) {
  alignas(64) uint16_t block[16 * kScaleGroup];
  alignas(64) float sums[kDirectTiles<float> * kRows * 16];
  const int64_t row_bytes = stored_bytes<format>(m.depth);
  for (int64_t j = 0; j < cols; j += 16) {
    std::memset(sums, 0, static_cast<size_t>(rows) * 64);
    FetchLines<4, 2> fetch{reinterpret_cast<const char*>(j + 16 < cols ? m.values + (row + j + 16) * row_bytes : next)};
    for (int64_t k = 0; k < m.depth; k += kScaleGroup) {
      const int64_t depth = least(kScaleGroup, m.depth - k);
      if (fetch.at != nullptr) fetch(static_cast<int>(stored_bytes<format>(kScaleGroup) * 16 / 64));
      widen_stored<format>(m, row + j, least(16, cols - j), k, depth, block, kScaleGroup);
      for (int64_t b = 0; b < depth; b += 32) {
        for (int64_t i = 0; i < rows; i += kRows) {
          dot_rows_n(least(kRows, rows - i), block + b, kScaleGroup, tiles + i / kRows * tile_words + (k + b) * kRows, sums + 16 * i);
        }
      }
    }
    for (int64_t i = 0; i < rows; ++i) store(c + i * ldc + j, load(sums + 16 * i));
  }
}

// As pack_panel_rows: rows [row, row + n), columns [k, k + depth) of m -> a panel [depth][kCols]. k begins a group.
template <StoredFormat format>
void pack_stored(const StoredMatrix& m, int64_t row, int64_t n, int64_t k, int64_t depth, float* out) {
  alignas(64) uint16_t block[16 * kScaleGroup];
  for (; depth > 0; k += kScaleGroup, depth -= kScaleGroup, out += kScaleGroup * kCols) {
    for (int64_t j = 0; j < kCols; j += 16) {
      const int64_t steps = least(kScaleGroup, depth);
      widen_stored<format>(m, row + j, least(16, n - j), k, steps, block, kScaleGroup);
      for (int64_t b = 0; b < steps; b += 32) transpose_16x32(block + b, kScaleGroup, out + b * kCols + j, kCols);
    }
  }
}

// As Forward of grouped_gemm.inl. The driver sees the weights as bytes, to fetch them.
template <StoredFormat format>
struct StoredForward : Forward<uint16_t> {
  using Forward<uint16_t>::p;
  StoredMatrix matrix(int64_t e, int64_t half) const { return stored_matrix(p, e, half); }
  const uint8_t* weights(int64_t e, int64_t half, int64_t row) const { return matrix(e, half).values + row * stride(); }
  int64_t stride() const { return stored_bytes<format>(p.K); }
  static constexpr int64_t stored(int64_t values) { return stored_bytes<format>(values); }
  void pack_cols(int64_t e, int64_t half, int64_t col, int64_t n, int64_t k, int64_t depth, W* out) const {
    pack_stored<format>(matrix(e, half), col, n, k, depth, out);
  }
  void few_rows(int64_t e, int64_t half, int64_t rows, W* tiles, int64_t tile_words, int64_t col, int64_t cols, float* c, int64_t ldc,
                const uint8_t* next) const {
    tiles_times_stored<format>(matrix(e, half), rows, tiles, tile_words, col, cols, c, ldc, next);
  }
};

inline void gemm_stored(const GroupedGemmParams& p) {
  switch (p.stored.format) {
    case StoredFormat::bf16: return run(Forward<uint16_t>{p});
    case StoredFormat::int8: return run(StoredForward<StoredFormat::int8>{{p}});
    case StoredFormat::int4: return run(StoredForward<StoredFormat::int4>{{p}});
    case StoredFormat::fp8: return run(StoredForward<StoredFormat::fp8>{{p}});
    case StoredFormat::fp8_blocks: return run(StoredForward<StoredFormat::fp8_blocks>{{p}});
  }
}
