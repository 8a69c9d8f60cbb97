// The blocked loop of a batch of matrix products by the GEMM tree: what grouped_gemm (batch = experts) and head_gemm (batch = heads) share.
// An op says how many products there are (`experts()`), their sizes, how its operands are packed and where results go; see Forward in
// grouped_gemm.inl. Included after vec.h and transpose.h, inside their anonymous namespace.
#pragma once
#include "cpu/inl/gemm_tile.inl"

constexpr int64_t kBlockRows = 288;  // results of kBlockRows x kBlockCols (288 KB) and the packed rows (144 KB) stay in a 1 MB L2
constexpr int64_t kBlockCols = 256;  // packing a row block is shared by 256 columns, packing a panel by up to 288 rows
// Blocks of many rows and much depth are wider where L2 has 1 MB at least, as with AVX-512: rows are packed half as often.
constexpr int64_t kWideCols = kCols == 32 ? 512 : kBlockCols, kManyRows = 128, kMuchDepth = 128;
template <class W>
constexpr int64_t kDirectRows = kDirectTiles<W> * kRows;  // of a forward whose weights are not packed
constexpr int64_t kFewRows = 32;  // up to so many rows, an item has 64 columns: more items for the threads of a decode step
// But an item of so few that its weights are not packed takes 64 to kTileCols columns, as many as leave each thread kItemsPerThread items:
// the first 16 come unfetched where another thread had the item before. 512 columns read 3 to 8 % faster than 64 (Zen 5, one thread).
constexpr int64_t kTileCols = 512, kItemsPerThread = 8;
constexpr int64_t kCacheBytes = 32 << 20;        // what an L3 may hold
constexpr int64_t kPackedRows = 288 * 1024 / 4;  // words of packed rows per chunk, when few rows allow a chunk longer than kDepth

// One call: the op, how many threads work on it, the columns of an item of up to kDirectRows rows, and whether the weights are too many
// for an L3 to hold.
template <class Op>
struct Call {
  const Op& op;
  int64_t threads, tile_cols;
  bool cold;
};

// So many steps of depth are so many elements of a row of weights. (Stored weights are bytes to the driver.)
template <class Op>
inline int64_t elements(int64_t depth) {
  if constexpr (requires { Op::stored(depth); }) return Op::stored(depth);
  return depth;
}

// How one expert's results are cut into work items. Row blocks are evened out, so that 300 rows are not 288 and 12.
struct Cut {
  int64_t block_rows, block_cols, row_blocks, col_blocks;
};

template <class Op>
inline Cut cut(const Call<Op>& call, int64_t e) {
  const Op& op = call.op;
  const int64_t rows = op.rows(e);
  if (rows == 0) return {};
  Cut c;
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  c.block_rows = round_up((rows + blocks - 1) / blocks, kRows);
  c.row_blocks = (rows + c.block_rows - 1) / c.block_rows;
  const int64_t cols = rows > kManyRows && op.depth(e) > kMuchDepth ? kWideCols
                       : !Op::kPanelRows || rows > kFewRows         ? kBlockCols
                       : rows > kDirectRows<typename Op::W>         ? 64
                                                                    : call.tile_cols;
  c.block_cols = cols / op.halves();
  c.col_blocks = (op.width() + c.block_cols - 1) / c.block_cols;
  return c;
}

// c [rows][ldc] = tiles of rows @ weights [cols, depth] at w, which go from where they lie straight into the sums; the second tile's from
// the cache. `next`: the weights that follow.
template <class W, class T>
void tiles_times_weights(bool cold, int64_t rows, const W* tiles, int64_t tile_words, const T* w, int64_t stride, int64_t cols,
                         int64_t depth, float* c, int64_t ldc, const T* next) {
  if constexpr (kDirectTiles<W> > 2) {
    if (rows > kRows) return tiles_times_rows(rows, tiles, tile_words, w, stride, cols, depth, c, ldc, next);
  }
  const int64_t step = rows <= kRows ? cols : 16;
  for (int64_t j = 0; j < cols; j += step) {
    for (int64_t i = 0; i < rows; i += kRows) {
      tile_times_rows_n(least(kRows, rows - i), cold, tiles + i / kRows * tile_words, w + j * stride, stride, least(step, cols - j), depth,
                        c + i * ldc + j, ldc,
                        i > 0             ? nullptr
                        : j + step < cols ? w + (j + step) * stride
                                          : next);
    }
  }
}

// A block of a few tiles of rows, whose weights are not packed.
template <class Op, class T>
void run_few(const Op& op, bool cold, int64_t e, int64_t row0, int64_t rows, int64_t col0, int64_t cols, const T* next) {
  using W = typename Op::W;
  const int64_t halves = op.halves(), width = round_up(cols, 16), ldc = halves * width, depth = op.depth(e);
  const int64_t words = round_up(depth, 32) / kPerWord<W>, tile_words = kRows * words;
  const int64_t room = kDirectRows<W> * round_up(words, 64);  // words; the tiles, or what a few rows of stored weights make of them
  float* c = static_cast<float*>(thread_scratch(Scratch::item, (kDirectRows<W> * ldc + room) * 4));
  W* tiles = reinterpret_cast<W*>(c + kDirectRows<W> * ldc);
  for (int64_t i = 0; i < rows; i += kRows) op.pack_rows(e, row0 + i, least(kRows, rows - i), 0, depth, tiles + i * words);
  for (int64_t half = 0; half < halves; ++half) {
    const T* after = half + 1 < halves ? op.weights(e, half + 1, col0) : next;
    float* at = c + half * width;
    if constexpr (requires { Op::stored(depth); }) {
      op.few_rows(e, half, rows, tiles, tile_words, col0, cols, at, ldc, after);
    } else {
      tiles_times_weights(cold, rows, tiles, tile_words, op.weights(e, half, col0), op.stride(), cols, depth, at, ldc, after);
    }
  }
  for (int64_t i = 0; i < rows; ++i) op.store(e, row0 + i, col0, cols, c + i * ldc, c + i * ldc + width);
}

// Where item `item` is, counted from 0 without the tail's; e == experts() past the end.
struct Place {
  int64_t e, row, rows, col, cols;
};

template <class Op>
inline Place place(const Call<Op>& call, int64_t item) {
  const Op& op = call.op;
  for (int64_t e = 0; e < op.experts(); ++e) {
    const Cut c = cut(call, e);
    if (item >= c.row_blocks * c.col_blocks) {
      item -= c.row_blocks * c.col_blocks;
      continue;
    }
    const int64_t row = item / c.col_blocks * c.block_rows, col = item % c.col_blocks * c.block_cols;
    return {e, row, least(c.block_rows, op.rows(e) - row), col, least(c.block_cols, op.width() - col)};
  }
  return {op.experts(), 0, 0, 0, 0};
}

// Weights whose rows are steps of depth. An op without weights multiplies two inputs, and may add to sums.
template <class Op>
constexpr bool kWeightColumns = !Op::kPanelRows && requires(const Op& op) { op.weights(0, 0, 0); };

// Rows of memory, fetched while tiles are multiplied: so many lines of so many rows a call. A line with each word, as FetchBlock does,
// costs blocks of many rows 3 to 5 %.
struct FetchAhead {
  const char* row = nullptr;
  int64_t stride = 0, row_bytes = 0, rows = 0;  // rows that are left, that at `row` included
  int each_lines = 0, each_rows = 0;
  FetchLines<4, 2> lines{row};
  FetchAhead() = default;
  template <class T>
  FetchAhead(const T* first, int64_t elements_apart, int64_t row_elements, int64_t count, int64_t calls)
      : row(reinterpret_cast<const char*>(first)), stride(elements_apart * sizeof(T)), row_bytes(row_elements * sizeof(T)), rows(count) {
    const int64_t row_lines = (row_bytes + 63) / 64, lines = rows * row_lines / calls + 1;
    const int64_t each = lines == 1 ? 1 : round_up(lines, 2);  // every second line asks for a page
    each_lines = static_cast<int>(least(each, row_lines));
    each_rows = static_cast<int>((each - 1) / row_lines) + 1;
  }
  Nothing operator()() {
    for (int i = 0; i < each_rows && rows > 0; ++i) {
      lines(each_lines);
      if (lines.at < row + row_bytes) return {};
      --rows;
      lines.at = row += stride;
    }
    return {};
  }
};

// `next`: the weights that follow, if there are any.
template <class Op, class T>
void run_block(const Op& op, int64_t e, int64_t row0, int64_t rows, int64_t col0, int64_t cols, const T* next) {
  using W = typename Op::W;
  const int64_t halves = op.halves(), half_panels = (cols + kCols - 1) / kCols, panels = halves * half_panels, ldc = panels * kCols;
  const int64_t tiles = (rows + kRows - 1) / kRows, depth = op.depth(e);
  const int64_t fitting = kPackedRows * kPerWord<W> / (tiles * kRows);
  const int64_t chunk = least(Op::kPanelRows && fitting > kDepth<W> ? fitting / kDepth<W> * kDepth<W> : kDepth<W>, round_up(depth, 32));

  const int64_t panel_words = kDepth<W> / kPerWord<W> * kCols, packed_words = tiles * kRows * chunk / kPerWord<W> + 16;
  float* c = static_cast<float*>(thread_scratch(Scratch::item, (tiles * kRows * ldc + packed_words + panel_words) * 4));
  W* panel = reinterpret_cast<W*>(c + tiles * kRows * ldc);
  W* packed = panel + panel_words;
  std::memset(c, 0, static_cast<size_t>(rows * ldc) * 4);
  FetchAhead fetch;
  if constexpr (requires { op.sums(e, row0, col0); }) {
    const int64_t calls = panels * tiles * ((depth + 31) / 32);
    if (op.sums(e, row0, col0) != nullptr && calls > 0) fetch = {op.sums(e, row0, col0), op.width(), cols, rows, calls};
  }
  for (int64_t k0 = 0; k0 < depth; k0 += chunk) {
    const int64_t steps = least(chunk, depth - k0), tile_words = kRows * round_up(steps, 32) / kPerWord<W>;
    const int64_t then = k0 + steps, then_steps = least(chunk, then < depth ? depth - then : depth);  // the next chunk, or of `next`
    const int64_t calls = tiles * ((steps + 31) / 32);                                                // of fetch, in a panel
    for (int64_t t = 0; t < tiles; ++t)
      op.pack_rows(e, row0 + t * kRows, least(kRows, rows - t * kRows), k0, steps, packed + t * tile_words);
    if constexpr (kWeightColumns<Op>) {
      fetch = {then < depth ? op.weights(e, 0, col0) + then * op.stride() : next, op.stride(), cols, then_steps, panels * calls};
    }
    for (int64_t j = 0; j < panels; ++j) {
      const int64_t half = j / half_panels, col = j % half_panels * kCols;
      if constexpr (Op::kPanelRows) {
        if (j + 1 < panels) {
          fetch = {op.weights(e, (j + 1) / half_panels, col0 + (j + 1) % half_panels * kCols) + elements<Op>(k0), op.stride(),
                   elements<Op>(steps), kCols, calls};
        } else {
          fetch = {then < depth ? op.weights(e, 0, col0) + elements<Op>(then) : next, op.stride(), elements<Op>(then_steps), kCols, calls};
        }
      }
      for (int64_t k = 0; k < steps; k += kDepth<W>) {
        const int64_t now = least(kDepth<W>, steps - k);
        op.pack_cols(e, half, col0 + col, least(kCols, cols - col), k0 + k, now, panel);
        for (int64_t t = 0; t < tiles; ++t) {
          tile_times_panel_n<typename Op::Layout>(rows - t * kRows, packed + t * tile_words + k / kPerWord<W> * kRows, panel,
                                                  c + t * kRows * ldc + j * kCols, ldc, now, fetch);
        }
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) op.store(e, row0 + i, col0, cols, c + i * ldc, c + i * ldc + half_panels * kCols);
}

template <class Op>
void run_item(void* context, int64_t item) {
  const Call<Op>& call = *static_cast<const Call<Op>*>(context);
  const Op& op = call.op;
  if (item == 0) return op.zero_tail();
  const Place now = place(call, item - 1);
  if constexpr (Op::kPanelRows || kWeightColumns<Op>) {
    const Place then = place(call, item - 1 + call.threads);  // the item that this thread takes next, if all are as fast
    const Place& follows = then.e < op.experts() ? then : now;
    const auto* next = op.weights(follows.e, 0, follows.col);
    if constexpr (Op::kPanelRows) {
      if (now.rows <= kDirectRows<typename Op::W>) return run_few(op, call.cold, now.e, now.row, now.rows, now.col, now.cols, next);
    }
    run_block(op, now.e, now.row, now.rows, now.col, now.cols, next);
  } else {
    run_block(op, now.e, now.row, now.rows, now.col, now.cols, static_cast<const char*>(nullptr));
  }
}

template <class Op>
void run(const Op& op) {
  int64_t weights = 0, tile_cols = 0;  // weights: elements of the vector side, counted once for each tile of rows that meets them
  for (int64_t e = 0; e < op.experts(); ++e) {
    const int64_t tiles = (op.rows(e) + kRows - 1) / kRows, cols = op.width() * op.halves();
    weights += tiles * cols * op.depth(e);
    if (op.rows(e) <= kDirectRows<typename Op::W>) tile_cols += cols;
  }
  const int64_t threads = weights / 8 < kSmallWorkNs ? 1 : parallel_threads();
  tile_cols = tile_cols / (kItemsPerThread * threads) / 64 * 64;
  Call<Op> call{op, threads, tile_cols < 64 ? 64 : least(tile_cols, kTileCols), false};
  if constexpr (Op::kPanelRows) {
    const int64_t row_bytes = elements<Op>(op.depth(0)) * static_cast<int64_t>(sizeof(*op.weights(0, 0, 0)));
    call.cold = op.experts() * op.halves() * op.width() * row_bytes > kCacheBytes;
  }
  int64_t items = 1;
  for (int64_t e = 0; e < op.experts(); ++e) {
    const Cut c = cut(call, e);
    items += c.row_blocks * c.col_blocks;
  }
  parallel_items(items, weights / 8, run_item<Op>, &call);
}
