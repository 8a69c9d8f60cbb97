// grouped_gemm / amx: out[r,:] = x[token(r),:] @ w[e(r)]^T, its dgrad and wgrad, bf16, on AMX tiles
// Contract   include/glmx/ops.h GroupedGemmParams   Oracle reference/grouped_gemm.py, gemm_tree.py   Doc docs/ops/grouped_gemm.md
// Shapes     as in cpu/inl/grouped_gemm.inl, dtype bf16; fp32 has no AMX kernel and runs avx512
// Layout     left operand: tiles of 16 rows x 32 depth, row-major; right operand: tiles of 16 pairs of depth x 16 columns. Both are packed
//            with zeros beyond rows, columns and depth, so there is one tile configuration. In the forward w is the left operand (results
//            come out transposed), and with few rows its whole tiles are loaded from where they lie: a decode step reads weights once
// Numerics   one tile product is the GEMM tree of ops.h; sums stay in tiles, or pass through fp32 memory unrounded. Zero padding adds
//            what the vector kernels' tree adds. Epilogue and stores are those of the vector kernels (cpu/inl/gemm_epilogue.inl)
// Algorithm  work item = kLeft x kRight results of one expert. For each kChunk of depth: pack the right operand, then for each 32 left
// rows:
//            pack them, run 2 x 2 tiles of results against all pairs of right tiles (4 tile loads for 4 products)
// Work/bytes 2*R*N*K flop; w once per block of 256 rows -> bound by memory below that many rows per expert at 1 TFLOP/s and 10 GB/s
// Measured   not measured on hardware; executed on the software twin of tile.h, bits equal to base (tests/cpp/test_amx.cpp)
// Limits     bf16 only; checked in ops/grouped_gemm.cpp
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/fatal.h"
#include "core/parallel.h"
#include "core/workspace.h"
#include "cpu/kernels.h"

namespace glmx::cpu::amx {
namespace {
#include "cpu/avx512/vec.h"

#include "cpu/amx/tile.h"
#include "cpu/avx512/transpose.h"
#include "cpu/inl/gemm_epilogue.inl"

constexpr int64_t kTile = 16 * 32;  // elements of an operand tile: 1 KB
constexpr int64_t kChunk = 2048;    // depth: 256 right columns x 2048 (1 MB) and the results (512 KB) stay in a 2 MB L2
constexpr int64_t kRight = 256;     // more right columns would push the packed operand out of L2 [reference/cpu_kernels.md, reach]
constexpr int64_t kLeft = 512;      // packing the right operand is shared by so many left rows
constexpr int64_t kFewRight = 32;   // one pass over the left operand: it is not packed, and items are smaller, for more threads
constexpr int64_t kLeftOfFew = 128;

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

// The three ops as the driver sees them: left(e) x right(e) results over depth(e). left_tile and right_tile pack one tile; `half` counts
// the parts of the left operand (gate and up).
struct Forward {
  const GroupedGemmParams& p;
  static constexpr bool kLeftInPlace = true;
  int64_t experts() const { return p.E; }
  int64_t halves() const { return p.silu_mul ? 2 : 1; }
  int64_t left(int64_t) const { return p.N / halves(); }
  int64_t right(int64_t e) const { return p.expert_offsets[e + 1] - p.expert_offsets[e]; }
  int64_t depth(int64_t) const { return p.K; }
  int64_t left_stride() const { return p.K; }
  const uint16_t* left_at(int64_t e, int64_t half, int64_t row, int64_t k) const {
    return static_cast<const uint16_t*>(p.w) + (e * p.N + half * left(e) + row) * p.K + k;
  }
  void left_tile(int64_t e, int64_t half, int64_t row, int64_t n, int64_t k, int64_t depth, uint16_t* out) const {
    const uint16_t* w = left_at(e, half, row, k);
    copy_left_tile([&](int64_t i) { return w + i * p.K; }, n, depth, out);
  }
  void right_tile(int64_t e, int64_t col, int64_t n, int64_t k, int64_t depth, uint16_t* out) const {
    const int64_t first = p.expert_offsets[e] + col;
    const uint16_t* x = static_cast<const uint16_t*>(p.x) + k;
    transpose_right_tile([&](int64_t i) { return x + (p.row_token != nullptr ? p.row_token[first + i] : first + i) * p.K; }, n, depth, out);
  }
  // c [halves * padded left][ldc]: transposed back 16 rows of the output at a time.
  void store(int64_t e, int64_t left0, int64_t lefts, int64_t right0, int64_t rights, const float* c, int64_t ldc) const {
    const int64_t padded = round_up(lefts, 32), width = halves() * padded;
    alignas(64) float rows[16 * kLeft];
    for (int64_t r = 0; r < rights; r += 16) {
      for (int64_t j = 0; j < width; j += 16) {
        __m512i block[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) block[i] = _mm512_loadu_si512(c + (j + i) * ldc + r);
        transpose_16x16(block);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(rows + i * width + j, block[i]);
      }
      for (int64_t i = 0; i < least(16, rights - r); ++i) {
        store_forward(p, e, p.expert_offsets[e] + right0 + r + i, left0, lefts, rows + i * width, rows + i * width + padded);
      }
    }
  }
  void zero_tail() const { zero_forward(p, p.expert_offsets[p.E], p.R); }
};

struct Dgrad {
  const GroupedGemmDgradParams& p;
  static constexpr bool kLeftInPlace = false;
  int64_t experts() const { return p.E; }
  int64_t halves() const { return 1; }
  int64_t left(int64_t e) const { return p.expert_offsets[e + 1] - p.expert_offsets[e]; }
  int64_t right(int64_t) const { return p.K; }
  int64_t depth(int64_t) const { return p.N; }
  int64_t left_stride() const { return p.N; }
  const uint16_t* left_at(int64_t e, int64_t, int64_t row, int64_t k) const {
    return static_cast<const uint16_t*>(p.dy) + (p.expert_offsets[e] + row) * p.N + k;
  }
  void left_tile(int64_t e, int64_t half, int64_t row, int64_t n, int64_t k, int64_t depth, uint16_t* out) const {
    const uint16_t* dy = left_at(e, half, row, k);
    copy_left_tile([&](int64_t i) { return dy + i * p.N; }, n, depth, out);
  }
  void right_tile(int64_t e, int64_t col, int64_t n, int64_t k, int64_t depth, uint16_t* out) const {
    const uint16_t* w = static_cast<const uint16_t*>(p.w) + (e * p.N + k) * p.K + col;
    interleave_right_tile([&](int64_t step) { return w + step * p.K; }, n, depth, out);
  }
  void store(int64_t e, int64_t left0, int64_t lefts, int64_t right0, int64_t rights, const float* c, int64_t ldc) const {
    for (int64_t i = 0; i < lefts; ++i) {
      store_row(p.dx, p.out_dtype, p.K, p.expert_offsets[e] + left0 + i, right0, rights, c + i * ldc, false);
    }
  }
  void zero_tail() const { zero_rows(p.dx, p.out_dtype, p.K, p.expert_offsets[p.E], p.R); }
};

struct Wgrad {
  const GroupedGemmWgradParams& p;
  static constexpr bool kLeftInPlace = false;
  int64_t experts() const { return p.E; }
  int64_t halves() const { return 1; }
  int64_t left(int64_t e) const { return p.accumulate && depth(e) == 0 ? 0 : p.N; }
  int64_t right(int64_t) const { return p.K; }
  int64_t depth(int64_t e) const { return p.expert_offsets[e + 1] - p.expert_offsets[e]; }
  int64_t left_stride() const { return 0; }
  const uint16_t* left_at(int64_t, int64_t, int64_t, int64_t) const { return nullptr; }
  void left_tile(int64_t e, int64_t, int64_t row, int64_t n, int64_t k, int64_t depth, uint16_t* out) const {
    const uint16_t* dy = static_cast<const uint16_t*>(p.dy) + (p.expert_offsets[e] + k) * p.N + row;
    transpose_left_tile([&](int64_t step) { return dy + step * p.N; }, n, depth, out);
  }
  void right_tile(int64_t e, int64_t col, int64_t n, int64_t k, int64_t depth, uint16_t* out) const {
    const int64_t first = p.expert_offsets[e] + k;
    const uint16_t* x = static_cast<const uint16_t*>(p.x) + col;
    interleave_right_tile([&](int64_t step) { return x + (p.row_token != nullptr ? p.row_token[first + step] : first + step) * p.K; }, n,
                          depth, out);
  }
  void store(int64_t e, int64_t left0, int64_t lefts, int64_t right0, int64_t rights, const float* c, int64_t ldc) const {
    for (int64_t i = 0; i < lefts; ++i) store_row(p.dw, p.out_dtype, p.K, e * p.N + left0 + i, right0, rights, c + i * ldc, p.accumulate);
  }
  void zero_tail() const {}
};

// A left operand of 32 rows over a chunk of depth: `in_place` whole tiles at `at`, the rest packed as [blocks][2][kTile].
struct Left {
  const uint16_t* at;
  int64_t stride, in_place;
  const uint16_t* packed;
};

// 32 x 32 results at c += left @ two right tiles (the second may be absent), over `blocks` steps of 32. first: c starts from zero.
template <bool two>
inline void tiles_2x2(const Left& left, const uint16_t* right0, const uint16_t* right1, int64_t blocks, bool first, float* c, int64_t ldc) {
  const int64_t row_bytes = ldc * 4;
  if (first) {
    tile_zero<0>();
    tile_zero<1>();
    if constexpr (two) {
      tile_zero<2>();
      tile_zero<3>();
    }
  } else {
    tile_load<0>(c, row_bytes);
    tile_load<1>(c + 16 * ldc, row_bytes);
    if constexpr (two) {
      tile_load<2>(c + 16, row_bytes);
      tile_load<3>(c + 16 * ldc + 16, row_bytes);
    }
  }
  for (int64_t b = 0; b < blocks; ++b) {
    if (b < left.in_place) {
      tile_load<4>(left.at + b * 32, left.stride * 2);
      tile_load<5>(left.at + 16 * left.stride + b * 32, left.stride * 2);
    } else {
      tile_load<4>(left.packed + 2 * b * kTile, 64);
      tile_load<5>(left.packed + (2 * b + 1) * kTile, 64);
    }
    tile_load<6>(right0 + b * kTile, 64);
    tile_dot<0, 4, 6>();
    tile_dot<1, 5, 6>();
    if constexpr (two) {
      tile_load<7>(right1 + b * kTile, 64);
      tile_dot<2, 4, 7>();
      tile_dot<3, 5, 7>();
    }
  }
  tile_store<0>(c, row_bytes);
  tile_store<1>(c + 16 * ldc, row_bytes);
  if constexpr (two) {
    tile_store<2>(c + 16, row_bytes);
    tile_store<3>(c + 16 * ldc + 16, row_bytes);
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
      if (Op::kLeftInPlace && rights <= kFewRight && rows == 32) {
        left = {op.left_at(e, half, left0 + from, k0), op.left_stride(), steps / 32, stripe};
      }
      for (int64_t b = left.in_place; b < blocks; ++b) {
        const int64_t k = k0 + b * 32, valid = least(32, steps - b * 32);
        op.left_tile(e, half, left0 + from, least(16, rows), k, valid, stripe + 2 * b * kTile);
        op.left_tile(e, half, left0 + from + 16, rows > 16 ? rows - 16 : 0, k, valid, stripe + (2 * b + 1) * kTile);
      }
      for (int64_t col = 0; col < rights; col += 32) {
        const uint16_t* pair = right + col / 16 * blocks * kTile;
        float* at = c + row * ldc + col;
        if (col + 16 < rights) {
          tiles_2x2<true>(left, pair, pair + blocks * kTile, blocks, k0 == 0, at, ldc);
        } else {
          tiles_2x2<false>(left, pair, nullptr, blocks, k0 == 0, at, ldc);
        }
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
  const int64_t most_left = (Op::kLeftInPlace && right <= kFewRight ? kLeftOfFew : kLeft) / op.halves();
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
    TileConfig config;  // seven tiles of 16 rows x 64 bytes; 16 x 64 bytes is the largest, and padding is zeros
    for (int t = 0; t < 8; ++t) {
      config.rows[t] = 16;
      config.row_bytes[t] = 64;
    }
    tile_configure(config);
    run_block(op, e, left0, least(c.left_rows, op.left(e) - left0), right0, least(c.right_cols, op.right(e) - right0));
    tile_release();
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

}  // namespace

void grouped_gemm(const GroupedGemmParams& p) { run(Forward{p}); }
void grouped_gemm_dgrad(const GroupedGemmDgradParams& p) { run(Dgrad{p}); }
void grouped_gemm_wgrad(const GroupedGemmWgradParams& p) { run(Wgrad{p}); }
}  // namespace glmx::cpu::amx
