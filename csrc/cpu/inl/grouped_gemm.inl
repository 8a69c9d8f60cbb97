// grouped_gemm: out[r,:] = x[token(r),:] @ w[e(r)]^T, its dgrad (dy @ w) and wgrad (dy^T @ x), for every vector ISA
// Contract   include/glmx/ops.h GroupedGemmParams   Oracle reference/grouped_gemm.py, gemm_tree.py   Doc docs/ops/grouped_gemm.md
// Shapes     x [M,K] | w [E,N,K] | dy, out [R,N] | dx [R,K] | dw [E,N,K] | offsets [E+1] i32 | row_token [R] i32
// Layout     both operands are packed to words in chunks of kDepth: the broadcast side in tiles of kRows rows, the vector side in panels of
//            kCols columns [depth][kCols]; depth is padded with zeros to 32, rows and columns that do not exist are never stored
// Numerics   the GEMM tree of ops.h, run for padded depth too; one rounding at the end. A result depends on its row, its column and
//            the depth alone, so X1 and X2 hold; the operations are those of V16, so X5 holds
// Algorithm  work item = block of rows x block of columns of one expert, with its own fp32 results (kBlockRows x kBlockCols, in L2).
//            For each chunk of depth: pack the rows, then for each panel: pack it (to L1), run every tile against it. The three ops
//            differ in how they pack and where they store. A forward block of a few tiles packs no weights: they are transposed in
//            registers on their way to the FMAs, in order (of pairs, once for all of up to 32 rows; else once for each of two tiles)
// Work/bytes 2*R*N*K flop; w once per block of rows: bound by memory below ~4 rows per expert, by the FMA units above
// Measured   Zen 4, 1 thread, CPU time on a shared machine, share of the tree fed from L1 (bench/roofline.py: 113 GFLOP/s, avx2 114),
//            bf16: 512 x 2048 -> 1408 90 GFLOP/s forward (79 %), 93 dgrad, 85 wgrad; 8 experts of 32 rows 68 (60 %); avx2 96 (84 %);
//            Zen 5, 1 thread, weights from memory, share of a read of the same memory (36 to 38 GB/s): one row 87 to 98 % at K of 512 to
//            4096, 2 rows 99, 4 rows 85 to 88; avx2, one row 93 to 100. Rows are re-measured by bench/ops/bench_grouped_gemm.py
// Limits     checked in ops/grouped_gemm.cpp

#include "cpu/inl/gemm_driver.inl"
#include "cpu/inl/gemm_epilogue.inl"

// The three ops as the driver sees them: `rows(e)` x `width()` results per expert over `depth(e)`; the columns come in `halves` parts.
template <class T>
struct Forward {
  const GroupedGemmParams& p;
  using W = Word<T>;
  using Layout = PackedRows<W>;
  static constexpr bool kPanelRows = true;
  int64_t experts() const { return p.E; }
  int64_t rows(int64_t e) const { return p.expert_offsets[e + 1] - p.expert_offsets[e]; }
  int64_t width() const { return p.silu_mul ? p.N / 2 : p.N; }
  int64_t halves() const { return p.silu_mul ? 2 : 1; }
  int64_t depth(int64_t) const { return p.K; }
  void pack_rows(int64_t e, int64_t row, int64_t n, int64_t k, int64_t depth, Word<T>* out) const {
    const int64_t first = p.expert_offsets[e] + row;
    const T* x = static_cast<const T*>(p.x) + k;
    pack_tile<T>([&](int64_t i) { return x + (p.row_token != nullptr ? p.row_token[first + i] : first + i) * p.K; }, n, depth, out);
  }
  void pack_cols(int64_t e, int64_t half, int64_t col, int64_t n, int64_t k, int64_t depth, Word<T>* out) const {
    pack_panel_rows(weights(e, half, col) + k, p.K, n, depth, out);
  }
  const T* weights(int64_t e, int64_t half, int64_t col) const {
    if (p.stored.table != nullptr) return reinterpret_cast<const T*>(p.stored.table[e * halves() + half]) + col * p.K;
    return static_cast<const T*>(p.w) + (e * p.N + half * width() + col) * p.K;
  }
  int64_t stride() const { return p.K; }
  void store(int64_t e, int64_t row, int64_t col, int64_t cols, float* c, float* up) const {
    store_forward(p, e, p.expert_offsets[e] + row, col, cols, c, up);
  }
  void zero_tail() const { zero_forward(p, p.expert_offsets[p.E], p.R); }
};

#include "cpu/inl/stored_weight.inl"

template <class T>
struct Dgrad {
  const GroupedGemmDgradParams& p;
  using W = Word<T>;
  using Layout = PackedRows<W>;
  static constexpr bool kPanelRows = false;
  int64_t experts() const { return p.E; }
  int64_t rows(int64_t e) const { return p.expert_offsets[e + 1] - p.expert_offsets[e]; }
  int64_t width() const { return p.K; }
  int64_t halves() const { return 1; }
  int64_t depth(int64_t) const { return p.N; }
  void pack_rows(int64_t e, int64_t row, int64_t n, int64_t k, int64_t depth, Word<T>* out) const {
    const T* dy = static_cast<const T*>(p.dy) + (p.expert_offsets[e] + row) * p.N + k;
    pack_tile<T>([&](int64_t i) { return dy + i * p.N; }, n, depth, out);
  }
  void pack_cols(int64_t e, int64_t, int64_t col, int64_t n, int64_t k, int64_t depth, Word<T>* out) const {
    const T* w = weights(e, 0, col) + k * p.K;
    pack_panel_columns<T>([&](int64_t step) { return w + step * p.K; }, n, depth, out);
  }
  const T* weights(int64_t e, int64_t, int64_t col) const { return static_cast<const T*>(p.w) + e * p.N * p.K + col; }
  int64_t stride() const { return p.K; }
  void store(int64_t e, int64_t row, int64_t col, int64_t cols, float* c, float*) const {
    store_row(p.dx, p.out_dtype, p.K, p.expert_offsets[e] + row, col, cols, c, false);
  }
  void zero_tail() const { zero_rows(p.dx, p.out_dtype, p.K, p.expert_offsets[p.E], p.R); }
};

template <class T>
struct Wgrad {
  const GroupedGemmWgradParams& p;
  using W = Word<T>;
  using Layout = PackedColumns<W>;
  static constexpr bool kPanelRows = false;
  int64_t experts() const { return p.E; }
  int64_t rows(int64_t e) const { return p.accumulate && depth(e) == 0 ? 0 : p.N; }
  int64_t width() const { return p.K; }
  int64_t halves() const { return 1; }
  int64_t depth(int64_t e) const { return p.expert_offsets[e + 1] - p.expert_offsets[e]; }
  void pack_rows(int64_t e, int64_t row, int64_t, int64_t k, int64_t depth, Word<T>* out) const {
    const T* dy = static_cast<const T*>(p.dy) + (p.expert_offsets[e] + k) * p.N + row;
    pack_tile_columns(dy, p.N, p.N - row, depth, out);
  }
  void pack_cols(int64_t e, int64_t, int64_t col, int64_t n, int64_t k, int64_t depth, Word<T>* out) const {
    const int64_t first = p.expert_offsets[e] + k;
    const T* x = static_cast<const T*>(p.x) + col;
    pack_panel_columns<T>([&](int64_t step) { return x + (p.row_token != nullptr ? p.row_token[first + step] : first + step) * p.K; }, n,
                          depth, out);
  }
  void store(int64_t e, int64_t row, int64_t col, int64_t cols, float* c, float*) const {
    store_row(p.dw, p.out_dtype, p.K, e * p.N + row, col, cols, c, p.accumulate);
  }
  const float* sums(int64_t e, int64_t row, int64_t col) const {  // nullptr: results are not added to any
    return p.accumulate ? static_cast<const float*>(p.dw) + (e * p.N + row) * p.K + col : nullptr;
  }
  void zero_tail() const {}
};

// d_bias[e, n] = sum of dy over the expert's rows: blocks of 64 rows counted from its first row, rows in order, blocks in order.
template <class T>
void bias_item(void* context, int64_t item) {
  const GroupedGemmBiasGradParams& p = *static_cast<const GroupedGemmBiasGradParams*>(context);
  const int64_t groups = (p.N + 15) / 16, e = item / groups, col = item % groups * 16;
  const int n = lanes(p.N - col);
  const T* dy = static_cast<const T*>(p.dy) + col;
  V16 sum = zero();
  for (int64_t block = p.expert_offsets[e]; block < p.expert_offsets[e + 1]; block += 64) {
    const int64_t end = least(block + 64, p.expert_offsets[e + 1]);
    V16 part = zero();
    for (int64_t r = block; r < end; ++r) part = add(part, load_n(dy + r * p.N, n));
    sum = add(sum, part);
  }
  float* out = p.d_bias + e * p.N + col;
  store_n(out, p.accumulate ? add(load_n(out, n), sum) : sum, n);
}

inline void gemm_forward(const GroupedGemmParams& p) {
  if (p.stored.table != nullptr) {
    gemm_stored(p);
  } else if (p.dtype == DType::bf16) {
    run(Forward<uint16_t>{p});
  } else {
    run(Forward<float>{p});
  }
}

inline void gemm_dgrad(const GroupedGemmDgradParams& p) {
  if (p.dtype == DType::bf16) {
    run(Dgrad<uint16_t>{p});
  } else {
    run(Dgrad<float>{p});
  }
}

inline void gemm_wgrad(const GroupedGemmWgradParams& p) {
  if (p.dtype == DType::bf16) {
    run(Wgrad<uint16_t>{p});
  } else {
    run(Wgrad<float>{p});
  }
}

inline void bias_gradient(const GroupedGemmBiasGradParams& p) {
  parallel_items(p.E * ((p.N + 15) / 16), (p.R + p.E) * p.N / 4, p.dtype == DType::bf16 ? bias_item<uint16_t> : bias_item<float>,
                 const_cast<GroupedGemmBiasGradParams*>(&p));
}
