// What the kernels of grouped_gemm share: which tile of which expert is whose, and what happens to a row of results before it is stored.
#pragma once
#include "glmx/ops.h"
#include "gpu/gx/gx.h"
#include "gpu/gx/math.h"

namespace glmx::gpu {

__device__ inline int64_t first_row(const int32_t* expert_offsets, int64_t e, int64_t R) {
  return expert_offsets != nullptr ? expert_offsets[e] : e == 0 ? 0 : R;  // no offsets: one expert has all rows
}

// A tile of results: `rows` of them from row `row` on, columns from `column` on. int: they live in registers beside the sums.
struct Tile {
  int expert, row, rows, column;
};

// Tiles of results whose rows are the tokens of experts. Only the device knows how many rows an expert has, so every block counts the
// tiles of all experts into shared memory and takes every gridDim.x-th one.
struct RowTiles {
  const int32_t* first;  // shared [E + 1]: the row tiles before those of expert e
  const int32_t* expert_offsets;
  int64_t R;
  int E, tile_rows, tile_columns, column_tiles;

  __device__ int count() const { return first[E] * column_tiles; }

  // Experts in order; inside one, bands of kBand row tiles, so that blocks at work at the same time share columns of weights, and the rows
  // of a band stay in the L2 cache while its columns pass.
  __device__ Tile tile(int index) const {
    constexpr int kBand = 16;
    int low = 0, high = E;  // the expert e with first[e] * column_tiles <= index < first[e + 1] * column_tiles
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first[middle] * column_tiles <= index ? low : high) = middle;
    }
    const int row_tiles = first[low + 1] - first[low], inside = index - first[low] * column_tiles;
    const int band = inside / (kBand * column_tiles), left = row_tiles - band * kBand, height = left < kBand ? left : kBand;
    const int place = inside - band * kBand * column_tiles, across = place / height;
    const int row = static_cast<int>(first_row(expert_offsets, low, R)) + (band * kBand + place - across * height) * tile_rows;
    const int rows = static_cast<int>(first_row(expert_offsets, low + 1, R)) - row;
    return {low, row, rows < tile_rows ? rows : tile_rows, across * tile_columns};
  }
};

// Fills first[0..E] by the block's first team; the caller's barrier follows.
__device__ inline void count_row_tiles(int32_t* first, const int32_t* expert_offsets, int64_t E, int64_t R, int tile_rows) {
  if (gx::team() != 0) return;
  int32_t before = 0;
  for (int64_t e0 = 0; e0 < E; e0 += gx::kTeam) {
    const int64_t e = e0 + gx::lane();
    const int64_t rows = e < E ? first_row(expert_offsets, e + 1, R) - first_row(expert_offsets, e, R) : 0;
    int32_t sum = static_cast<int32_t>((rows + tile_rows - 1) / tile_rows);
    for (int step = 1; step < gx::kTeam; step *= 2) {
      const int32_t left = gx::shuffle(sum, (gx::lane() - step) & (gx::kTeam - 1));
      if (gx::lane() >= step) sum += left;
    }
    if (e < E) first[e + 1] = before + sum;
    before += gx::shuffle(sum, gx::kTeam - 1);
  }
  if (gx::lane() == 0) first[0] = 0;
}

// A row that x does not have ends the stream. Each block looks at its share of the rows, before or after its tiles: wherever it has
// registers to spare, since a tile that read past x ends with the stream all the same.
__device__ inline void check_rows(const int32_t* row_token, const int32_t* expert_offsets, int64_t E, int64_t R, int64_t M) {
  if (row_token == nullptr) return;
  const int64_t rows = first_row(expert_offsets, E, R), step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < rows; i += step) gx::require(row_token[i] >= 0 && row_token[i] < M);
}

__device__ inline float load_model(const void* p, DType dtype, int64_t at) {
  return dtype == DType::bf16 ? gx::load(static_cast<const uint16_t*>(p) + at) : gx::load(static_cast<const float*>(p) + at);
}
__device__ inline void store_model(void* p, DType dtype, int64_t at, float value) {
  if (dtype == DType::bf16) {
    gx::store(static_cast<uint16_t*>(p) + at, value);
  } else {
    gx::store(static_cast<float*>(p) + at, value);
  }
}

// One result of the forward: column `column` of row `row` of the output from its sum, with silu_mul from those of gate and up.
__device__ inline void store_forward(const GroupedGemmParams& p, int64_t expert, int64_t row, int64_t column, float sum, float up) {
  const int64_t half = p.N / 2;
  if (p.bias != nullptr) {
    sum = sum + load_model(p.bias, p.dtype, expert * p.N + column);
    if (p.silu_mul) up = up + load_model(p.bias, p.dtype, expert * p.N + half + column);
  }
  if (!p.silu_mul) {
    store_model(p.out, p.out_dtype, row * p.N + column, sum);
    return;
  }
  if (p.preact != nullptr) {
    store_model(p.preact, p.dtype, row * p.N + column, sum);
    store_model(p.preact, p.dtype, row * p.N + half + column, up);
  }
  store_model(p.out, p.out_dtype, row * half + column, gx::silu_mul(sum, up));
}

// Rows past the last expert's are zeros. Called by threads `thread` of `threads` of the whole grid.
__device__ inline void zero_rows(void* matrix, DType dtype, int64_t width, int64_t begin, int64_t end, int64_t thread, int64_t threads) {
  for (int64_t i = begin * width + thread; i < end * width; i += threads) store_model(matrix, dtype, i, 0.0f);
}
__device__ inline void zero_forward(const GroupedGemmParams& p, int64_t thread, int64_t threads) {
  const int64_t begin = first_row(p.expert_offsets, p.E, p.R);
  zero_rows(p.out, p.out_dtype, p.silu_mul ? p.N / 2 : p.N, begin, p.R, thread, threads);
  if (p.preact != nullptr) zero_rows(p.preact, p.dtype, p.N, begin, p.R, thread, threads);
}

// No more tiles than this exist, whatever the offsets say.
inline int64_t most_tiles(const char* op, int64_t R, int64_t E, int64_t tile_rows, int64_t column_tiles) {
  const int64_t partial = E < R ? E : R, tiles = (R / tile_rows + partial) * column_tiles;
  GLMX_CHECK(tiles < (int64_t{1} << 31), op, ": expected fewer than 2^31 tiles of ", tile_rows, " rows: got ", tiles);
  return tiles;
}
inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace glmx::gpu
