// head_gemm: y[t,a,:] = x[t,a,:] @ w[a]^T, or @ w[a]; head_gemm_wgrad: dw[a] = dy[:,a,:]^T @ x[:,a,:]; for every vector ISA
// Contract   include/glmx/ops.h HeadGemmParams   Oracle reference/head_gemm.py, gemm_tree.py   Doc docs/ops/head_gemm.md
// Shapes     x [T,A,K] | w [A,N,K] or [A,K,N] | y, dy [T,A,N] | dw [A,N,K]; views, dense in the last dimension
// Layout     as in grouped_gemm.inl: both operands are packed to words, tiles of kRows tokens and panels of kCols columns
// Numerics   the GEMM tree of ops.h; one rounding at the end. A result depends on its row, its column and the depth alone
// Algorithm  gemm_driver.inl with heads in the place of experts: a work item is a block of tokens x a block of columns of one head.
//            The rows of w [A,N,K] meet a single tile of tokens unpacked; those of w [A,K,N] are always packed
// Work/bytes 2*T*A*N*K flop; w once per block of rows: bound by memory for a few tokens, by the FMA units above
// Measured   not measured yet (speed is step 5)
// Limits     checked in ops/head_gemm.cpp

#include "cpu/inl/gemm_driver.inl"
#include "cpu/inl/gemm_epilogue.inl"

template <class T>
struct Heads {
  const HeadGemmParams& p;
  using W = Word<T>;
  using Layout = PackedRows<W>;
  int64_t experts() const { return p.A; }
  int64_t rows(int64_t) const { return p.T; }
  int64_t width() const { return p.N; }
  int64_t halves() const { return 1; }
  int64_t depth(int64_t) const { return p.K; }
  void pack_rows(int64_t a, int64_t row, int64_t n, int64_t k, int64_t depth, Word<T>* out) const {
    const T* x = static_cast<const T*>(p.x) + row * p.x_token + a * p.x_head + k;
    pack_tile<T>([&](int64_t i) { return x + i * p.x_token; }, n, depth, out);
  }
  void store(int64_t a, int64_t row, int64_t col, int64_t cols, float* c, float*) const {
    store_row(head_of(p.y, p.out_dtype, a * p.y_head), p.out_dtype, p.y_token, row, col, cols, c, false);
  }
  void zero_tail() const {}
};

template <class T>
struct RowWeights : Heads<T> {  // w [A, N, K]
  using Heads<T>::p;
  static constexpr bool kPanelRows = true;
  const T* weights(int64_t a, int64_t, int64_t col) const { return static_cast<const T*>(p.w) + a * p.w_head + col * p.w_row; }
  int64_t stride() const { return p.w_row; }
  void pack_cols(int64_t a, int64_t half, int64_t col, int64_t n, int64_t k, int64_t depth, Word<T>* out) const {
    pack_panel_rows(weights(a, half, col) + k, p.w_row, n, depth, out);
  }
};

template <class T>
struct ColumnWeights : Heads<T> {  // w [A, K, N]
  using Heads<T>::p;
  static constexpr bool kPanelRows = false;
  void pack_cols(int64_t a, int64_t, int64_t col, int64_t n, int64_t k, int64_t depth, Word<T>* out) const {
    const T* w = weights(a, 0, col) + k * p.w_row;
    pack_panel_columns<T>([&](int64_t step) { return w + step * p.w_row; }, n, depth, out);
  }
  const T* weights(int64_t a, int64_t, int64_t col) const { return static_cast<const T*>(p.w) + a * p.w_head + col; }
  int64_t stride() const { return p.w_row; }
};

template <class T>
struct HeadWgrad {
  const HeadGemmWgradParams& p;
  using W = Word<T>;
  using Layout = PackedColumns<W>;
  static constexpr bool kPanelRows = false;
  int64_t experts() const { return p.A; }
  int64_t rows(int64_t) const { return p.N; }
  int64_t width() const { return p.K; }
  int64_t halves() const { return 1; }
  int64_t depth(int64_t) const { return p.T; }
  void pack_rows(int64_t a, int64_t row, int64_t, int64_t k, int64_t depth, Word<T>* out) const {
    const T* dy = static_cast<const T*>(p.dy) + k * p.dy_token + a * p.dy_head + row;
    pack_tile_columns(dy, p.dy_token, p.N - row, depth, out);
  }
  void pack_cols(int64_t a, int64_t, int64_t col, int64_t n, int64_t k, int64_t depth, Word<T>* out) const {
    const T* x = static_cast<const T*>(p.x) + k * p.x_token + a * p.x_head + col;
    pack_panel_columns<T>([&](int64_t step) { return x + step * p.x_token; }, n, depth, out);
  }
  void store(int64_t a, int64_t row, int64_t col, int64_t cols, float* c, float*) const {
    store_row(head_of(p.dw, p.out_dtype, a * p.dw_head), p.out_dtype, p.dw_row, row, col, cols, c, p.accumulate);
  }
  void zero_tail() const {}
};

template <class T>
void run_heads(const HeadGemmParams& p) {
  if (p.transposed) {
    run(ColumnWeights<T>{{p}});
  } else {
    run(RowWeights<T>{{p}});
  }
}

inline void head_gemm_heads(const HeadGemmParams& p) { p.dtype == DType::bf16 ? run_heads<uint16_t>(p) : run_heads<float>(p); }

inline void head_gemm_weights(const HeadGemmWgradParams& p) {
  if (p.dtype == DType::bf16) {
    run(HeadWgrad<uint16_t>{p});
  } else {
    run(HeadWgrad<float>{p});
  }
}
