// head_gemm / amx: y[t,a,:] = x[t,a,:] @ w[a]^T, or @ w[a]; head_gemm_wgrad: dw[a] = dy[:,a,:]^T @ x[:,a,:], bf16, on AMX tiles
// Contract   include/glmx/ops.h HeadGemmParams   Oracle reference/head_gemm.py, gemm_tree.py   Doc docs/ops/head_gemm.md
// Shapes     as in cpu/inl/head_gemm.inl, dtype bf16; fp32 has no AMX kernel and runs avx512
// Layout     as in grouped_gemm.cpp: w [A,N,K] is the left operand and results come out transposed, of few tokens without packing w;
//            w [A,K,N] is the right operand
// Numerics   one tile product is the GEMM tree of ops.h; stores are the vector kernels'
// Algorithm  tile_gemm.h, with heads in the place of experts
// Work/bytes 2*T*A*N*K flop; w once per block of 256 rows
// Measured   not measured on hardware; executed on the software twin of tile.h, bits equal to base (tests/cpp/ops)
// Limits     bf16 only; checked in ops/head_gemm.cpp
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

#include "cpu/amx/tile_gemm.h"

// Left and right operand, as in grouped_gemm.cpp.
struct RowWeights {  // w [A, N, K] @ x^T
  const HeadGemmParams& p;
  static constexpr bool kLeftWeights = true, kLeftInPlace = true;
  int64_t experts() const { return p.A; }
  int64_t halves() const { return 1; }
  int64_t left(int64_t) const { return p.N; }
  int64_t right(int64_t) const { return p.T; }
  int64_t depth(int64_t) const { return p.K; }
  int64_t left_stride() const { return p.w_row; }
  const uint16_t* left_at(int64_t a, int64_t, int64_t row, int64_t k) const {
    return static_cast<const uint16_t*>(p.w) + a * p.w_head + row * p.w_row + k;
  }
  void left_tile(int64_t a, int64_t, int64_t row, int64_t n, int64_t k, int64_t depth, uint16_t* out) const {
    copy_left_tile([&](int64_t i) { return left_at(a, 0, row + i, k); }, n, depth, out);
  }
  void right_tile(int64_t a, int64_t col, int64_t n, int64_t k, int64_t depth, uint16_t* out) const {
    const uint16_t* x = static_cast<const uint16_t*>(p.x) + a * p.x_head + k;
    transpose_right_tile([&](int64_t i) { return x + (col + i) * p.x_token; }, n, depth, out);
  }
  void store(int64_t a, int64_t left0, int64_t lefts, int64_t right0, int64_t rights, const float* c, int64_t ldc) const {
    each_result_column(c, round_up(lefts, 32), ldc, rights, [&](int64_t i, const float* row) {
      store_row(head_of(p.y, p.out_dtype, a * p.y_head), p.out_dtype, p.y_token, right0 + i, left0, lefts, row, false);
    });
  }
  void zero_tail() const {}
};

struct ColumnWeights {  // x @ w [A, K, N]
  const HeadGemmParams& p;
  static constexpr bool kLeftWeights = false, kLeftInPlace = false;
  int64_t experts() const { return p.A; }
  int64_t halves() const { return 1; }
  int64_t left(int64_t) const { return p.T; }
  int64_t right(int64_t) const { return p.N; }
  int64_t depth(int64_t) const { return p.K; }
  int64_t left_stride() const { return p.x_token; }
  const uint16_t* left_at(int64_t a, int64_t, int64_t row, int64_t k) const {
    return static_cast<const uint16_t*>(p.x) + row * p.x_token + a * p.x_head + k;
  }
  void left_tile(int64_t a, int64_t, int64_t row, int64_t n, int64_t k, int64_t depth, uint16_t* out) const {
    copy_left_tile([&](int64_t i) { return left_at(a, 0, row + i, k); }, n, depth, out);
  }
  void right_tile(int64_t a, int64_t col, int64_t n, int64_t k, int64_t depth, uint16_t* out) const {
    const uint16_t* w = static_cast<const uint16_t*>(p.w) + a * p.w_head + k * p.w_row + col;
    interleave_right_tile([&](int64_t step) { return w + step * p.w_row; }, n, depth, out);
  }
  void store(int64_t a, int64_t left0, int64_t lefts, int64_t right0, int64_t rights, const float* c, int64_t ldc) const {
    void* y = head_of(p.y, p.out_dtype, a * p.y_head);
    for (int64_t i = 0; i < lefts; ++i) store_row(y, p.out_dtype, p.y_token, left0 + i, right0, rights, c + i * ldc, false);
  }
  void zero_tail() const {}
};

struct HeadWgrad {
  const HeadGemmWgradParams& p;
  static constexpr bool kLeftWeights = false, kLeftInPlace = false;
  int64_t experts() const { return p.A; }
  int64_t halves() const { return 1; }
  int64_t left(int64_t) const { return p.N; }
  int64_t right(int64_t) const { return p.K; }
  int64_t depth(int64_t) const { return p.T; }
  int64_t left_stride() const { return 0; }
  const uint16_t* left_at(int64_t, int64_t, int64_t, int64_t) const { return nullptr; }
  void left_tile(int64_t a, int64_t, int64_t row, int64_t n, int64_t k, int64_t depth, uint16_t* out) const {
    const uint16_t* dy = static_cast<const uint16_t*>(p.dy) + k * p.dy_token + a * p.dy_head + row;
    transpose_left_tile([&](int64_t step) { return dy + step * p.dy_token; }, n, depth, out);
  }
  void right_tile(int64_t a, int64_t col, int64_t n, int64_t k, int64_t depth, uint16_t* out) const {
    const uint16_t* x = static_cast<const uint16_t*>(p.x) + k * p.x_token + a * p.x_head + col;
    interleave_right_tile([&](int64_t step) { return x + step * p.x_token; }, n, depth, out);
  }
  void store(int64_t a, int64_t left0, int64_t lefts, int64_t right0, int64_t rights, const float* c, int64_t ldc) const {
    void* dw = head_of(p.dw, p.out_dtype, a * p.dw_head);
    for (int64_t i = 0; i < lefts; ++i) store_row(dw, p.out_dtype, p.dw_row, left0 + i, right0, rights, c + i * ldc, p.accumulate);
  }
  void zero_tail() const {}
};
}  // namespace

void head_gemm(const HeadGemmParams& p) { p.transposed ? run(ColumnWeights{p}) : run(RowWeights{p}); }
void head_gemm_wgrad(const HeadGemmWgradParams& p) { run(HeadWgrad{p}); }
}  // namespace glmx::cpu::amx
