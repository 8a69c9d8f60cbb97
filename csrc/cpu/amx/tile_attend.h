// The products of cpu/inl/attend.inl on tiles, in the place of its FmaUnit: bf16, the same bits.
// Scores: rows of keys are the left operand, read from where they lie, and packed queries the right one: few queries pack no keys. Results
// come out as [keys][queries] and are transposed. Sums: weights are the left operand, values the right one, packed as pairs of rows.
// Included after attend.inl and what tile_product.h needs, inside an anonymous namespace.
#pragma once
#include "cpu/amx/tile_product.h"

struct TileUnit {
  using T = uint16_t;
  using Session = TileSession;
  static constexpr int64_t kTileRows = 16;

  struct Queries {
    int64_t D, steps;
    uint16_t *tiles, *keys;  // right tiles [rows / 16][steps]; left tiles of 32 keys
    float* scores;           // 32 x 32
    Queries(Pieces& pieces, int64_t rows, int64_t depth, float* shared)
        : D(depth),
          steps((D + 31) / 32),
          tiles(as_halves(pieces.take(round_up(rows, 16) * steps * 16))),
          keys(as_halves(pieces.take(steps * kTile))),
          scores(shared) {}
    void pack(const QueryRows& rows, const T* matrix) const {
      for (int64_t i = 0; i < rows.count; i += 16) {
        for (int64_t b = 0; b < steps; ++b) {
          const auto row = [&](int64_t r) { return matrix + rows.at(i + r) * D + b * 32; };
          transpose_right_tile(row, least(16, rows.count - i), least(32, D - b * 32), tiles + (i / 16 * steps + b) * kTile);
        }
      }
    }
    template <class Meanwhile = const Nothing>
    void times_keys(int64_t from, int64_t rows, const T* block, int64_t stride, int64_t n, float* out, Meanwhile&& meanwhile = {}) const {
      for (int64_t j = 0; j < n; j += 32) {
        const T* first = block + j * stride;
        const Left left{first, stride, n - j < 32 ? 0 : D / 32, keys};
        for (int64_t b = left.in_place; b < steps; ++b) {
          const auto row = [&](int64_t r) { return first + r * stride + b * 32; };
          copy_left_tile(row, least(16, n - j), least(32, D - b * 32), keys + 2 * b * kTile);
          copy_left_tile([&](int64_t r) { return row(16 + r); }, n - j - 16, least(32, D - b * 32), keys + (2 * b + 1) * kTile);
        }
        for (int64_t i = from; i < rows; i += 32) {
          const uint16_t* pair = tiles + i / 16 * steps * kTile;
          meanwhile().done();
          tile_product_of(n - j, rows - i, left, pair, pair + steps * kTile, steps, true, scores, 32);
          for (int64_t r = 0; r < least(32, rows - i); r += 16) {
            for (int64_t key = 0; key < least(32, n - j); key += 16) {
              transpose_results(scores + key * 32 + r, 32, out + (i + r) * kBlockKeys + j + key, kBlockKeys);
            }
          }
        }
      }
    }
  };

  struct Sums {
    int64_t D, ld;
    float *acc, *panel;  // panel: of values, or four right tiles
    uint16_t* weights;   // left tiles [rows / 32][2 steps][2]
    Sums(Pieces& pieces, int64_t rows, int64_t width, float* shared)
        : D(width),
          ld(round_up(D, 32)),
          acc(pieces.take((rows + 16) * ld)),  // tiles of rows need not start at a multiple of 16
          panel(shared),
          weights(as_halves(pieces.take(round_up(rows, 32) * kBlockKeys / 2))) {}
    // Tiles take the rows that see the whole block; those before them, which are few, go the way of the vector kernels.
    template <class Meanwhile = const Nothing>
    void add(const float* p, const int32_t* seen, int64_t from, int64_t rows, const T* values, int64_t stride, int64_t n,
             Meanwhile&& meanwhile = {}) const {
      int64_t whole = from;
      while (whole < rows && seen[whole] < n) ++whole;
      if (from < whole) queries_times_values(p, seen, from, whole, values, stride, n, D, panel, panel, acc, ld);
      const int64_t steps = (n + 31) / 32;
      for (int64_t i = whole; i < rows; i += 16) {
        for (int64_t b = 0; b < steps; ++b) {
          uint16_t* tile = weights + ((i - whole) / 32 * 2 * steps + 2 * b + (i - whole) / 16 % 2) * kTile;
          for (int64_t r = 0; r < 16; ++r) pack_weights(i + r < rows ? p + (i + r) * kBlockKeys + b * 32 : nullptr, tile + r * 32);
        }
      }
      uint16_t* right = as_halves(panel);  // [2][2 steps]
      for (int64_t j = 0; j < D && whole < rows; j += 32) {
        for (int64_t b = 0; b < steps; ++b) {
          const auto row = [&](int64_t key) { return values + (b * 32 + key) * stride + j; };
          interleave_right_tile(row, least(16, D - j), least(32, n - b * 32), right + b * kTile);
          if (D - j <= 16) continue;
          interleave_right_tile([&](int64_t key) { return row(key) + 16; }, least(16, D - j - 16), least(32, n - b * 32),
                                right + (steps + b) * kTile);
        }
        for (int64_t i = whole; i < rows; i += 32) {
          const Left left{nullptr, 0, 0, weights + (i - whole) / 32 * 2 * steps * kTile};
          meanwhile().done();
          tile_product_of(rows - i, D - j, left, right, right + steps * kTile, steps, false, acc + i * ld + j, ld);
        }
      }
    }
    // 32 weights are bf16 already: their upper halves. No row: zeros.
    static void pack_weights(const float* p, uint16_t* out) {
      __m512i low = _mm512_setzero_si512(), high = low;
      if (p != nullptr) {
        low = _mm512_srli_epi32(_mm512_loadu_si512(p), 16);
        high = _mm512_srli_epi32(_mm512_loadu_si512(p + 16), 16);
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(low));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm512_cvtepi32_epi16(high));
    }
  };
};
