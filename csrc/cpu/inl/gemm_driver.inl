// The blocked loop of a batch of matrix products by the GEMM tree: what grouped_gemm (batch = experts) and head_gemm (batch = heads) share.
// An op says how many products there are (`experts()`), their sizes, how its operands are packed and where results go; see Forward in
// grouped_gemm.inl. Included after vec.h and transpose.h, inside their anonymous namespace.
#pragma once
#include "cpu/inl/gemm_tile.inl"

constexpr int64_t kBlockRows = 288;  // results of kBlockRows x kBlockCols (288 KB) and the packed rows (144 KB) stay in a 1 MB L2
constexpr int64_t kBlockCols = 256;  // packing a row block is shared by 256 columns, packing a panel by up to 288 rows
constexpr int64_t kFewRows = 32;     // up to so many rows, an item has 64 columns: more items for the threads of a decode step
constexpr int64_t kPackedRows = 160 * 1024 / 4;  // words of packed rows per chunk, when few rows allow a chunk longer than kDepth

// How one expert's results are cut into work items. Row blocks are evened out, so that 300 rows are not 288 and 12.
struct Cut {
  int64_t block_rows, block_cols, row_blocks, col_blocks;
};

template <class Op>
inline Cut cut(const Op& op, int64_t e) {
  const int64_t rows = op.rows(e);
  if (rows == 0) return {};
  Cut c;
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  c.block_rows = round_up((rows + blocks - 1) / blocks, kRows);
  c.row_blocks = (rows + c.block_rows - 1) / c.block_rows;
  c.block_cols = (Op::kPanelRows && rows <= kFewRows ? 64 : kBlockCols) / op.halves();
  c.col_blocks = (op.width() + c.block_cols - 1) / c.block_cols;
  return c;
}

// A block of one tile of rows: the weights go from where they lie straight into the sums.
template <class Op>
void run_few(const Op& op, int64_t e, int64_t row0, int64_t rows, int64_t col0, int64_t cols) {
  using W = typename Op::W;
  const int64_t halves = op.halves(), width = round_up(cols, 16), ldc = halves * width, depth = op.depth(e);
  float* c = static_cast<float*>(thread_scratch(Scratch::item, (kRows * ldc + kRows * round_up(depth, 32) / kPerWord<W>)*4));
  W* tile = reinterpret_cast<W*>(c + kRows * ldc);
  op.pack_rows(e, row0, rows, 0, depth, tile);
  for (int64_t half = 0; half < halves; ++half) {
    tile_times_rows_n(rows, tile, op.weights(e, half, col0), op.stride(), cols, depth, c + half * width, ldc);
  }
  for (int64_t i = 0; i < rows; ++i) op.store(e, row0 + i, col0, cols, c + i * ldc, c + i * ldc + width);
}

template <class Op>
void run_block(const Op& op, const Cut& cut, int64_t e, int64_t row_block, int64_t col_block) {
  using W = typename Op::W;
  const int64_t row0 = row_block * cut.block_rows, rows = least(cut.block_rows, op.rows(e) - row0);
  const int64_t col0 = col_block * cut.block_cols, cols = least(cut.block_cols, op.width() - col0);
  if constexpr (Op::kPanelRows) {
    if (rows <= kRows) return run_few(op, e, row0, rows, col0, cols);
  }
  const int64_t panels = (cols + kCols - 1) / kCols, halves = op.halves(), ldc = halves * panels * kCols;
  const int64_t tiles = (rows + kRows - 1) / kRows, depth = op.depth(e);
  const int64_t fitting = kPackedRows * kPerWord<W> / (tiles * kRows);
  const int64_t chunk = least(Op::kPanelRows && fitting > kDepth<W> ? fitting / kDepth<W> * kDepth<W> : kDepth<W>, round_up(depth, 32));

  const int64_t panel_words = kDepth<W> / kPerWord<W> * kCols, packed_words = tiles * kRows * chunk / kPerWord<W> + 16;
  float* c = static_cast<float*>(thread_scratch(Scratch::item, (tiles * kRows * ldc + packed_words + panel_words) * 4));
  W* panel = reinterpret_cast<W*>(c + tiles * kRows * ldc);
  W* packed = panel + panel_words;
  std::memset(c, 0, static_cast<size_t>(rows * ldc) * 4);
  for (int64_t k0 = 0; k0 < depth; k0 += chunk) {
    const int64_t steps = least(chunk, depth - k0), tile_words = kRows * round_up(steps, 32) / kPerWord<W>;
    for (int64_t t = 0; t < tiles; ++t)
      op.pack_rows(e, row0 + t * kRows, least(kRows, rows - t * kRows), k0, steps, packed + t * tile_words);
    for (int64_t j = 0; j < halves * panels; ++j) {
      const int64_t half = j / panels, col = j % panels * kCols;
      for (int64_t k = 0; k < steps; k += kDepth<W>) {
        const int64_t now = least(kDepth<W>, steps - k);
        op.pack_cols(e, half, col0 + col, least(kCols, cols - col), k0 + k, now, panel);
        for (int64_t t = 0; t < tiles; ++t) {
          tile_times_panel_n<typename Op::Layout>(rows - t * kRows, packed + t * tile_words + k / kPerWord<W> * kRows, panel,
                                                  c + t * kRows * ldc + j * kCols, ldc, now);
        }
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) op.store(e, row0 + i, col0, cols, c + i * ldc, c + i * ldc + panels * kCols);
}

template <class Op>
void run_item(void* context, int64_t item) {
  const Op& op = *static_cast<const Op*>(context);
  if (item == 0) return op.zero_tail();
  --item;
  for (int64_t e = 0; e < op.experts(); ++e) {
    const Cut c = cut(op, e);
    const int64_t items = c.row_blocks * c.col_blocks;
    if (item < items) return run_block(op, c, e, item / c.col_blocks, item % c.col_blocks);
    item -= items;
  }
}

template <class Op>
void run(const Op& op) {
  int64_t items = 1, weights = 0;  // weights: elements of the vector side, counted once for each tile of rows that meets them
  for (int64_t e = 0; e < op.experts(); ++e) {
    const Cut c = cut(op, e);
    items += c.row_blocks * c.col_blocks;
    weights += (op.rows(e) + kRows - 1) / kRows * op.width() * op.halves() * op.depth(e);
  }
  parallel_items(items, weights / 8, run_item<Op>, const_cast<Op*>(&op));
}
