// Words of two bf16 elements, in the place of one fp32: how the GEMM tree runs on vdpbf16ps, at twice the rate of fp32 FMA.
// The instruction adds the products of a word's halves to a sum in two fused steps, the upper half first, each rounded to nearest even,
// denormals flushed [Intel SDM, VDPBF16PS; core/features.cpp asks the CPU]. Elements k and k + 2 in one word are two links of one chain of
// the tree; k and k + 1, as they lie in memory, are not.
// Included after avx512/vec.h and avx512/transpose.h, before what is compiled for words; the ISA's kernels are bf16 alone.
#pragma once
#include "cpu/inl/gemm_tile.inl"

struct Pair {
  uint32_t halves;
};
struct P16 {
  __m512i v;
};
template <>
struct WordOf<uint16_t> {
  using type = Pair;
};
template <>
constexpr int kPerWord<Pair> = 2;
template <>
constexpr int64_t kDirectTiles<Pair> = 8;

inline P16 load(const Pair* p) { return {_mm512_loadu_si512(p)}; }
inline P16 set1(Pair a) { return {_mm512_set1_epi32(static_cast<int>(a.halves))}; }
inline V16 fma(P16 a, P16 b, V16 c) { return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))}; }

// Elements that are there, of 32.
inline __mmask32 first_halves(int64_t n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0 : (1u << n) - 1u; }

// Word w of a row holds elements first_of(w) and first_of(w) + 2.
inline int64_t first_of(int64_t w) { return w / 2 * 4 + w % 2; }

// Where the halves of a row's words are among its 32 elements.
alignas(64) constexpr uint16_t kHalves[32] = {2,  0,  3,  1,  6,  4,  7,  5,  10, 8,  11, 9,  14, 12, 15, 13,
                                              18, 16, 19, 17, 22, 20, 23, 21, 26, 24, 27, 25, 30, 28, 31, 29};

inline __m512i pair_row(__m512i row) { return _mm512_permutexvar_epi16(_mm512_load_si512(kHalves), row); }

template <class T, class Row>
inline void pack_tile(Row row, int64_t rows, int64_t depth, Pair* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* from = row(i);
    Pair* to = out + i * 16;
    for (int64_t k = 0; k < depth; k += 32, to += 16 * kRows) {
      _mm512_storeu_si512(to, pair_row(_mm512_maskz_loadu_epi16(first_halves(depth - k), from + k)));
      __builtin_prefetch(from + k + depth, 0, 2);
    }
  }
}

// 32 columns of two rows: words of the upper row's and the lower row's element, where they are there.
inline void pair_columns(const uint16_t* upper, __mmask32 of_upper, const uint16_t* lower, __mmask32 of_lower, Pair* out) {
  alignas(64) constexpr uint16_t kJoin[32] = {32, 0, 33, 1, 34, 2,  35, 3,  36, 4,  37, 5,  38, 6,  39, 7,
                                              40, 8, 41, 9, 42, 10, 43, 11, 44, 12, 45, 13, 46, 14, 47, 15};
  const __m512i high = _mm512_maskz_loadu_epi16(of_upper, upper), low = _mm512_maskz_loadu_epi16(of_lower, lower);
  const __m512i first = _mm512_load_si512(kJoin), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  _mm512_storeu_si512(out, _mm512_permutex2var_epi16(high, first, low));
  _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi16(high, second, low));
}

// Stores of a word row spill over into the next ones, which come later.
inline void pack_tile_columns(const uint16_t* from, int64_t width, int64_t left, int64_t depth, Pair* out) {
  const __mmask16 valid = first_lanes(lanes(left));
  const auto row = [&](int64_t k) {
    return k < depth ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, from + k * width)) : _mm512_setzero_si512();
  };
  for (int64_t w = 0; w < round_up(depth, 32) / 2; ++w, out += kRows) {
    const int64_t k = first_of(w);
    _mm512_storeu_si512(out, _mm512_or_si512(_mm512_slli_epi32(row(k), 16), row(k + 2)));
  }
}

template <class T, class Row>
inline void pack_panel_columns(Row row, int64_t n, int64_t depth, Pair* out) {
  static_assert(kCols == 32);
  const __mmask32 columns = first_halves(n);
  for (int64_t w = 0; w < round_up(depth, 32) / 2; ++w, out += kCols) {
    // For a row that is not there nothing of the last one is loaded. A masked load of no address takes 70 ns (Zen 5).
    const int64_t k = first_of(w);
    const bool above = k < depth, below = k + 2 < depth;
    const T *upper = row(above ? k : depth - 1), *lower = row(below ? k + 2 : depth - 1);
    __builtin_prefetch(upper + kCols);
    __builtin_prefetch(lower + kCols);
    pair_columns(upper, above ? columns : 0, lower, below ? columns : 0, out);
  }
}

// Sixteen rows of 32 elements of w, transposed: word k of each in r[k].
[[gnu::always_inline]] inline void load_block(const uint16_t* p, int64_t stride, __m512i (&r)[16]) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = pair_row(_mm512_loadu_si512(p + i * stride));
  transpose_16x16(r);
}

inline void transpose_16x32(const uint16_t* p, int64_t stride, Pair* out, int64_t out_stride) {
  __m512i r[16];
  load_block(p, stride, r);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * out_stride, r[i]);
}

// One block of the GEMM tree: sums[i * 16 ..] += row i's words, at a[i * 16 ..], of the block's columns.
template <int rows>
[[gnu::always_inline]] inline void rows_times_block(const Pair* a, const __m512i (&r)[16], float* sums) {
  V16 chain[2][rows];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) chain[0][i] = chain[1][i] = zero();
#pragma GCC unroll 16
  for (int w = 0; w < 16; ++w) {
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) chain[w % 2][i] = fma(set1(a[i * 16 + w]), P16{r[w]}, chain[w % 2][i]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) store(sums + 16 * i, add(load(sums + 16 * i), add(chain[0][i], chain[1][i])));
}

// As tile_times_rows, for any number of tiles, `tile_words` apart: a block of w is transposed once for all of them.
inline void tiles_times_rows(int64_t rows, const Pair* tiles, int64_t tile_words, const uint16_t* w, int64_t stride, int64_t cols,
                             int64_t depth, float* c, int64_t ldc, const uint16_t* next) {
  alignas(64) float sums[kDirectTiles<Pair> * kRows * 16];
  for (int64_t j = 0; j < cols; j += 16) {
    std::memset(sums, 0, static_cast<size_t>(rows) * 64);
    FetchLines<4, 2> fetch{reinterpret_cast<const char*>(j + 16 < cols ? w + (j + 16) * stride : next)};
    for (int64_t k = 0; k < depth; k += 32) {
      const uint16_t* block = w + j * stride + k;
      if (fetch.at != nullptr) fetch(16);
      __m512i r[16];
      if (j + 16 <= cols && k + 32 <= depth) {
        load_block(block, stride, r);
      } else {
        alignas(64) uint16_t padded[16 * 32];
        pad_block(block, stride, cols - j, depth - k, padded);
        load_block(padded, 32, r);
      }
      const Pair* a = tiles + k / 2 * kRows;
      int64_t i = 0;
      for (; i + kRows <= rows; i += kRows, a += tile_words) rows_times_block<kRows>(a, r, sums + 16 * i);
      for (; i < rows; ++i, a += 16) rows_times_block<1>(a, r, sums + 16 * i);
    }
    for (int64_t i = 0; i < rows; ++i) store(c + i * ldc + j, load(sums + 16 * i));
  }
}

// One block of the GEMM tree, as dot_16x32 of avx512/transpose.h: a[i * 16 + w] is word w of row i.
template <int rows>
inline void dot_16x32(const uint16_t* p, int64_t stride, const Pair* a, V16* c) {
  __m512i r[16];
  load_block(p, stride, r);
  V16 chain[2][rows];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) chain[0][i] = chain[1][i] = zero();
#pragma GCC unroll 16
  for (int w = 0; w < 16; ++w) {
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) chain[w % 2][i] = fma(set1(a[i * 16 + w]), P16{r[w]}, chain[w % 2][i]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) c[i] = add(c[i], add(chain[0][i], chain[1][i]));
}
