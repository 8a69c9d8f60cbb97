// The GEMM tree on a tile of rows and a panel of columns, and how both are packed: what grouped_gemm and attention are made of.
// Included after vec.h and transpose.h, inside their anonymous namespace; the ISA sets kRows x kVecs: accumulators 2 * kRows * kVecs
// (even and odd chain) + kVecs + 1 must fit the vector registers. Packed operands are made of words: fp32, an element each, unless the
// ISA multiplies others (WordOf). The words of 32 elements of depth belong to the even and the odd chain in turns.
#pragma once
#include "cpu/inl/meanwhile.inl"
#include "cpu/inl/sizes.inl"
#include "cpu/inl/words.inl"

constexpr int kCols = 16 * kVecs;
template <class W>
constexpr int64_t kDepth = 128 * kPerWord<W>;  // a panel of kDepth x kCols (16 KB at 32 columns) stays in a 32 KB L1

// So many tiles of rows meet weights that are not packed; more than two if the ISA has a tiles_times_rows.
template <class W>
constexpr int64_t kDirectTiles = 2;

// Where a tile's words are: row i, word k of a block of 32 elements at i * row + k * depth; the next block is `block` further on.
template <class W>
struct PackedRows {  // [depth / 32][kRows][kBlockWords], from pack_tile
  static constexpr int row = kBlockWords<W>, depth = 1, block = kBlockWords<W> * kRows;
};
template <class W>
struct PackedColumns {  // [words][kRows], from pack_tile_columns
  static constexpr int row = 1, depth = kRows, block = kBlockWords<W> * kRows;
};

// The columns of a panel [words][kCols]. Others may take their place: word(k, out) gives word k of each, down(n) goes n words down.
template <class W>
struct Panel {
  const W* at;
  template <class Vec>
  [[gnu::always_inline]] void word(int k, Vec (&out)[kVecs]) const {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) out[j] = load(at + k * kCols + 16 * j);
  }
  void down(int n) { at += n * kCols; }
};

// One word of depth: chain[i][j] += row i's word * the panel's vector j.
template <int rows, class Layout, class W, class Columns>
[[gnu::always_inline]] inline void tile_step(const W* a, const Columns& columns, int k, V16 (&chain)[rows][kVecs]) {
  a += k * Layout::depth;
  decltype(set1(*a)) panel[kVecs];
  columns.word(k, panel);
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
    const auto row = set1(a[i * Layout::row]);
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) chain[i][j] = fma(row, panel[j], chain[i][j]);
  }
}

// c[rows][kCols] += a tile @ a panel's columns. A last block of fewer than 32 elements ends early: the words of zeros that it lacks
// would do no more than turn a chain of -0 into +0, which adding +0 does too.
template <int rows, class Layout, class W, class Columns, class Meanwhile>
inline void tile_times_columns(const W* a, Columns columns, float* c, int64_t ldc, int64_t depth, Meanwhile& meanwhile) {
  for (; depth > 0; depth -= 32, a += Layout::block, columns.down(kBlockWords<W>)) {
    auto other = meanwhile();
    const int words = depth < 32 ? static_cast<int>(words_of<W>(depth)) : kBlockWords<W>;
    V16 even[rows][kVecs], odd[rows][kVecs];
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) even[i][j] = odd[i][j] = zero();
    }
    int k = 0;
    for (; k + 1 < words; k += 2) {
      other.step();
      tile_step<rows, Layout>(a, columns, k, even);
      other.step();
      tile_step<rows, Layout>(a, columns, k + 1, odd);
    }
    if (k < words) tile_step<rows, Layout>(a, columns, k, even);
    other.done();
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        if (words < kBlockWords<W>) {
          even[i][j] = add(even[i][j], zero());
          odd[i][j] = add(odd[i][j], zero());
        }
        float* at = c + i * ldc + 16 * j;
        store(at, add(load(at), add(even[i][j], odd[i][j])));
      }
    }
  }
}

// The first n rows of a tile, 1 <= n; a tile has at most kRows.
template <class Layout, int rows = kRows, class W, class Meanwhile = const Nothing>
inline void tile_times_panel_n(int64_t n, const W* a, const W* b, float* c, int64_t ldc, int64_t depth, Meanwhile&& meanwhile = {}) {
  if constexpr (rows > 1) {
    if (n < rows) return tile_times_panel_n<Layout, rows - 1>(n, a, b, c, ldc, depth, meanwhile);
  }
  tile_times_columns<rows, Layout>(a, Panel<W>{b}, c, ldc, depth, meanwhile);
}

// Rows of T that are contiguous in depth -> one tile [depth / 32][kRows][kBlockWords]. `row(i)` is where row i's depth begins.
template <class T, class Row>
inline void pack_tile(Row row, int64_t rows, int64_t depth, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* from = row(i);
    float* to = out + i * 32;
    for (int64_t k = 0; k < depth; k += 32, to += 32 * kRows) {
      if (k + 32 <= depth) {
        store(to, load(from + k));
        store(to + 16, load(from + k + 16));
      } else {
        store(to, load_n(from + k, lanes(depth - k)));
        store(to + 16, depth - k > 16 ? load_n(from + k + 16, lanes(depth - k - 16)) : zero());
      }
    }
  }
}

// Columns of a [depth, width] matrix -> one tile [depth][kRows]. Each store spills over into the next step of depth, which comes later:
// the buffer has 16 floats to spare.
template <class T>
inline void pack_tile_columns(const T* from, int64_t width, int64_t left, int64_t depth, float* out) {
  int64_t k = 0;
  for (; k < depth; ++k) store(out + k * kRows, left >= 16 ? load(from + k * width) : load_n(from + k * width, lanes(left)));
  for (; k % 32 != 0; ++k) store(out + k * kRows, zero());
}

// A block at the edge: its `rows` x `steps` elements (at most 16 x 32 of them), the rest zeros.
template <class T>
inline void pad_block(const T* from, int64_t stride, int64_t rows, int64_t steps, T* out) {
  std::memset(out, 0, 16 * 32 * sizeof(T));
  for (int64_t i = 0; i < least(rows, 16); ++i) {
    std::memcpy(out + i * 32, from + i * stride, static_cast<size_t>(least(steps, 32)) * sizeof(T));
  }
}

// Rows [0, n) of w, contiguous in depth -> a panel [words][kCols].
template <class T>
inline void pack_panel_rows(const T* from, int64_t stride, int64_t n, int64_t depth, Word<T>* out) {
  for (int64_t k = 0; k < depth; k += 32, out += kBlockWords<Word<T>> * kCols) {
    for (int64_t j = 0; j < kCols; j += 16) {
      const T* block = from + j * stride + k;
      Word<T>* to = out + j;
      if (j + 16 <= n && k + 32 <= depth) {
        transpose_16x32(block, stride, to, kCols);
        continue;
      }
      alignas(64) T padded[16 * 32];
      pad_block(block, stride, n - j, depth - k, padded);
      transpose_16x32(padded, 32, to, kCols);
    }
  }
}

// Columns [0, n) of a matrix whose rows are steps of depth -> a panel [words][kCols]. `row(k)` is where step k's columns begin.
template <class T, class Row>
inline void pack_panel_columns(Row row, int64_t n, int64_t depth, float* out) {
  int64_t k = 0;
  for (; k < depth; ++k, out += kCols) {
    const T* from = row(k);
    for (int64_t j = 0; j < kCols; j += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + kCols + j);
    for (int64_t j = 0; j < kCols; j += 16) {
      store(out + j, j + 16 <= n ? load(from + j) : j < n ? load_n(from + j, static_cast<int>(n - j)) : zero());
    }
  }
  for (; k % 32 != 0; ++k, out += kCols) {
    for (int64_t j = 0; j < kCols; j += 16) store(out + j, zero());
  }
}

// Memory fetched in its order, line by line, while something else is computed. Zen 5 drops a fetch that finds no free miss buffer or no
// translation of its page, and who comes to a dropped line waits for memory. So each line's address is `pace` additions, each waiting for
// the one before, behind the last line's, and every `ask` lines a line 64 KB ahead, some pages on, is asked for once more.
template <int pace, int ask>
struct FetchLines {
  const char* at;
  [[gnu::always_inline]] void operator()(int lines) {
    const char* page = at + 64 * 1024;
#pragma GCC unroll 32
    for (int i = 0; i < lines; ++i) {
      __builtin_prefetch(at);
      if (i % ask == ask - 1) __builtin_prefetch(page);
#pragma GCC unroll 8
      for (int step = 0; step < pace; ++step) {
        at += 64 * (step + 1) / pace - 64 * step / pace;
        asm volatile("" : "+r"(at));  // keeps the compiler from adding 64 at once
      }
    }
  }
};

// Up to kRows rows (one tile, packed over all depth) @ rows of w, 16 at a time and without packing them: c [rows][ldc].
// Meanwhile the next 16 rows are fetched, as they lie in memory: sixteen rows abreast are more streams than a core's prefetchers
// follow. After the last rows come those at `next`, if any; a fetch of what is not there reads nothing. Paces are measured (Zen 5, 4.2
// GHz): one row from memory reads at 33 to 36 GB/s with 4, 35 to 38 with 5, 36 to 38 with 6, from L3 at 55, 48 and 41. More rows: 4.
template <int rows, int pace, class T>
inline void tile_times_rows(const Word<T>* tile, const T* w, int64_t stride, int64_t cols, int64_t depth, float* c, int64_t ldc,
                            const T* next) {
  for (int64_t j = 0; j < cols; j += 16) {
    V16 sum[rows];
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) sum[i] = zero();
    FetchLines<pace, rows == 1 ? 4 : 2> fetch{reinterpret_cast<const char*>(j + 16 < cols ? w + (j + 16) * stride : next)};
    for (int64_t k = 0; k < depth; k += 32) {
      const T* block = w + j * stride + k;
      if (fetch.at != nullptr) fetch(8 * static_cast<int>(sizeof(T)));
      if (j + 16 <= cols && k + 32 <= depth) {
        dot_16x32<rows>(block, stride, tile + k / kPerWord<Word<T>> * kRows, sum);
      } else {
        alignas(64) T padded[16 * 32];
        pad_block(block, stride, cols - j, depth - k, padded);
        dot_16x32<rows>(padded, 32, tile + k / kPerWord<Word<T>> * kRows, sum);
      }
    }
    for (int i = 0; i < rows; ++i) store(c + i * ldc + j, sum[i]);
  }
}

// cold: w lies in memory, not in L3.
template <class T, int rows = kRows>
inline void tile_times_rows_n(int64_t n, bool cold, const Word<T>* tile, const T* w, int64_t stride, int64_t cols, int64_t depth, float* c,
                              int64_t ldc, const T* next) {
  if constexpr (rows > 1) {
    if (n < rows) return tile_times_rows_n<T, rows - 1>(n, cold, tile, w, stride, cols, depth, c, ldc, next);
    tile_times_rows<rows, 4>(tile, w, stride, cols, depth, c, ldc, next);
  } else if (cold) {
    tile_times_rows<1, 6>(tile, w, stride, cols, depth, c, ldc, next);
  } else {
    tile_times_rows<1, 5>(tile, w, stride, cols, depth, c, ldc, next);
  }
}
