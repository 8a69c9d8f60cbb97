// grouped_gemm / amx: out[r,:] = x[token(r),:] @ w[e(r)]^T, its dgrad and wgrad, bf16, on AMX tiles
// Contract   include/glmx/ops.h GroupedGemmParams   Oracle reference/grouped_gemm.py, gemm_tree.py   Doc docs/ops/grouped_gemm.md
// Shapes     as in cpu/inl/grouped_gemm.inl, dtype bf16; fp32 has no AMX kernel and runs avx512
// Layout     left operand: tiles of 16 rows x 32 depth, row-major; right operand: tiles of 16 pairs of depth x 16 columns. Both are packed
//            with zeros beyond rows, columns and depth, so there is one tile configuration. In the forward w is the left operand (results
//            come out transposed), and with few rows its whole tiles are loaded from where they lie: a decode step reads weights once
// Numerics   one tile product is the GEMM tree of ops.h; sums stay in tiles, or pass through fp32 memory unrounded. Zero padding adds
//            what the vector kernels' tree adds. Epilogue and stores are those of the vector kernels (cpu/inl/gemm_epilogue.inl)
// Algorithm  tile_gemm.h: work item = kLeft x kRight results of one expert. For each kChunk of depth: pack the right operand, then for
//            each 32 left rows: pack them, run 2 x 2 tiles of results against all pairs of right tiles (4 tile loads for 4 products)
// Work/bytes 2*R*N*K flop; w once per block of 256 rows -> bound by memory below that many rows per expert at 1 TFLOP/s and 10 GB/s
// Measured   not measured on hardware; executed on the software twin of tile.h, bits equal to base (tests/cpp/test_gemm.cpp)
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
#include "cpu/avx512/stored.h"
#include "cpu/avx512/transpose.h"
#include "cpu/inl/gemm_epilogue.inl"
#include "cpu/inl/stored_matrix.inl"

#include "cpu/amx/tile_gemm.h"

// The three ops as the driver sees them: left(e) x right(e) results over depth(e). left_tile and right_tile pack one tile; `half` counts
// the parts of the left operand (gate and up).
struct Forward {
  const GroupedGemmParams& p;
  static constexpr bool kLeftWeights = true, kLeftInPlace = true;
  int64_t experts() const { return p.E; }
  int64_t halves() const { return p.silu_mul ? 2 : 1; }
  int64_t left(int64_t) const { return p.N / halves(); }
  int64_t right(int64_t e) const { return p.expert_offsets[e + 1] - p.expert_offsets[e]; }
  int64_t depth(int64_t) const { return p.K; }
  int64_t left_stride() const { return p.K; }
  const uint16_t* left_at(int64_t e, int64_t half, int64_t row, int64_t k) const {
    if (p.stored.table != nullptr) return reinterpret_cast<const uint16_t*>(p.stored.table[e * halves() + half]) + row * p.K + k;
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
  // c [halves * padded left][ldc]: its columns are rows of the output.
  void store(int64_t e, int64_t left0, int64_t lefts, int64_t right0, int64_t rights, const float* c, int64_t ldc) const {
    const int64_t padded = round_up(lefts, 32);
    each_result_column(c, halves() * padded, ldc, rights, [&](int64_t i, float* row) {
      store_forward(p, e, p.expert_offsets[e] + right0 + i, left0, lefts, row, row + padded);
    });
  }
  void zero_tail() const { zero_forward(p, p.expert_offsets[p.E], p.R); }
};

// Stored weights are always packed: their tiles are made of 4 or 8 bits on the way.
template <StoredFormat format>
struct StoredForward : Forward {
  static constexpr bool kLeftInPlace = false;
  void left_tile(int64_t e, int64_t half, int64_t row, int64_t n, int64_t k, int64_t depth, uint16_t* out) const {
    widen_stored<format>(stored_matrix(p, e, half), row, n, k, depth, out, 32);
  }
};

void run_stored(const GroupedGemmParams& p) {
  switch (p.stored.format) {
    case StoredFormat::bf16: return run(Forward{p});
    case StoredFormat::int8: return run(StoredForward<StoredFormat::int8>{{p}});
    case StoredFormat::int4: return run(StoredForward<StoredFormat::int4>{{p}});
    case StoredFormat::fp8: return run(StoredForward<StoredFormat::fp8>{{p}});
    case StoredFormat::fp8_blocks: return run(StoredForward<StoredFormat::fp8_blocks>{{p}});
  }
}

struct Dgrad {
  const GroupedGemmDgradParams& p;
  static constexpr bool kLeftWeights = false, kLeftInPlace = false;
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
  static constexpr bool kLeftWeights = false, kLeftInPlace = false;
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
}  // namespace

void grouped_gemm(const GroupedGemmParams& p) { p.stored.table != nullptr ? run_stored(p) : run(Forward{p}); }
void grouped_gemm_dgrad(const GroupedGemmDgradParams& p) { run(Dgrad{p}); }
void grouped_gemm_wgrad(const GroupedGemmWgradParams& p) { run(Wgrad{p}); }
}  // namespace glmx::cpu::amx
