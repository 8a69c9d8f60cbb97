// The blocked loop of a batch of matrix products on tiles: what grouped_gemm (batch = experts) and head_gemm (batch = heads) share.
// An op says how many products there are (`experts()`), their sizes, how its operands are packed and where results go; see Forward in
// grouped_gemm.cpp. Included after what tile_product.h needs, inside an anonymous namespace.
#pragma once
#include "cpu/amx/tile_product.h"

constexpr int64_t kChunk = 2048;   // depth: 256 right columns x 2048 (1 MB) and the results (512 KB) stay in a 2 MB L2
constexpr int64_t kRight = 256;    // more right columns would push the packed operand out of L2 [reference/cpu_kernels.md, reach]
constexpr int64_t kLeft = 512;     // packing the right operand is shared by so many left rows
constexpr int64_t kFewRight = 32;  // one pass over the left operand: it is not packed, and items are smaller, for more threads
constexpr int64_t kLeftOfFew = 128;

// Columns of c [height][ldc], as rows: body(i, row) for column i < cols, row [height].
template <class Body>
inline void each_result_column(const float* c, int64_t height, int64_t ldc, int64_t cols, Body body) {
  alignas(64) float rows[16 * kLeft];
  for (int64_t first = 0; first < cols; first += 16) {
    for (int64_t j = 0; j < height; j += 16) transpose_results(c + j * ldc + first, ldc, rows + j, height);
    for (int64_t i = 0; i < least(16, cols - first); ++i) body(first + i, rows + i * height);
  }
}

template <class Op>
void run_block(const Op& op, int64_t e, int64_t left0, int64_t lefts, int64_t right0, int64_t rights) {
  const int64_t padded = round_up(lefts, 32), height = op.halves() * padded, ldc = round_up(rights, 16), depth = op.depth(e);
  const int64_t chunk = least(kChunk, round_up(depth, 32));
  float* c = static_cast<float*>(thread_scratch(Scratch::item, height * ldc * 4 + (ldc + 32) * chunk * 2));
  uint16_t* right = as_halves(c + height * ldc);
  uint16_t* stripe = right + ldc * chunk;
  if (depth == 0) std::memset(c, 0, static_cast<size_t>(height * ldc) * 4);
  for (int64_t k0 = 0; k0 < depth; k0 += chunk) {
    const int64_t steps = least(chunk, depth - k0), blocks = (steps + 31) / 32;
    for (int64_t col = 0; col < rights; col += 16) {
      for (int64_t b = 0; b < blocks; ++b) {
        op.right_tile(e, right0 + col, least(16, rights - col), k0 + b * 32, least(32, steps - b * 32),
                      right + (col / 16 * blocks + b) * kTile);
      }
    }
    for (int64_t row = 0; row < height; row += 32) {
      const int64_t half = row / padded, from = row % padded, rows = least(32, lefts - from);
      Left left{nullptr, 0, 0, stripe};
      if (Op::kLeftInPlace && rights <= kFewRight && rows == 32 && op.left_stride() >= 32) {
        left = {op.left_at(e, half, left0 + from, k0), op.left_stride(), steps / 32, stripe};
      }
      for (int64_t b = left.in_place; b < blocks; ++b) {
        const int64_t k = k0 + b * 32, valid = least(32, steps - b * 32);
        op.left_tile(e, half, left0 + from, least(16, rows), k, valid, stripe + 2 * b * kTile);
        op.left_tile(e, half, left0 + from + 16, rows > 16 ? rows - 16 : 0, k, valid, stripe + (2 * b + 1) * kTile);
      }
      for (int64_t col = 0; col < rights; col += 32) {
        const uint16_t* pair = right + col / 16 * blocks * kTile;
        tile_product_of(32, rights - col, left, pair, pair + blocks * kTile, blocks, k0 == 0, c + row * ldc + col, ldc);
      }
    }
  }
  op.store(e, left0, lefts, right0, rights, c, ldc);
}

// Work items of one expert: blocks evened out to whole stripes and tiles.
struct Cut {
  int64_t left_rows, right_cols, left_blocks, right_blocks;
};

template <class Op>
inline Cut cut(const Op& op, int64_t e) {
  const int64_t left = op.left(e), right = op.right(e);
  if (left == 0 || right == 0) return {};
  const int64_t most_left = (Op::kLeftWeights && right <= kFewRight ? kLeftOfFew : kLeft) / op.halves();
  Cut c;
  const int64_t left_blocks = (left + most_left - 1) / most_left, right_blocks = (right + kRight - 1) / kRight;
  c.left_rows = round_up((left + left_blocks - 1) / left_blocks, 32);
  c.right_cols = round_up((right + right_blocks - 1) / right_blocks, 16);
  c.left_blocks = (left + c.left_rows - 1) / c.left_rows;
  c.right_blocks = (right + c.right_cols - 1) / c.right_cols;
  return c;
}

template <class Op>
void run_item(void* context, int64_t item) {
  const Op& op = *static_cast<const Op*>(context);
  if (item == 0) return op.zero_tail();
  --item;
  for (int64_t e = 0; e < op.experts(); ++e) {
    const Cut c = cut(op, e);
    const int64_t items = c.left_blocks * c.right_blocks;
    if (item >= items) {
      item -= items;
      continue;
    }
    const int64_t left0 = item / c.right_blocks * c.left_rows, right0 = item % c.right_blocks * c.right_cols;
    const TileSession session;
    run_block(op, e, left0, least(c.left_rows, op.left(e) - left0), right0, least(c.right_cols, op.right(e) - right0));
    return;
  }
}

template <class Op>
void run(const Op& op) {
  int64_t items = 1, tiles = 0;  // tiles: 16 x 16 results at 32 k
  for (int64_t e = 0; e < op.experts(); ++e) {
    const Cut c = cut(op, e);
    items += c.left_blocks * c.right_blocks;
    tiles += (op.left(e) + 15) / 16 * op.halves() * ((op.right(e) + 15) / 16) * ((op.depth(e) + 31) / 32);
  }
  parallel_items(items, tiles * 32, run_item<Op>, const_cast<Op*>(&op));
}
