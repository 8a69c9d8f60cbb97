// What attend.inl does with words of pairs: weights of keys, and the values that they meet. Included after attend.inl and pairs.h.
#pragma once
#include "cpu/inl/attend.inl"

inline void pack_values(const uint16_t* values, int64_t stride, int64_t n, int64_t cols, Pair* panels) {
  const int64_t panel = words_of<Pair>(n) * kCols;
  for (int64_t key = 0; key < n; key += 4, panels += 2 * kCols) {  // four keys are a word of each chain
    const uint16_t* row = values + key * stride;
    const __mmask32 is[4] = {0xffffffffu, key + 1 < n ? 0xffffffffu : 0, key + 2 < n ? 0xffffffffu : 0, key + 3 < n ? 0xffffffffu : 0};
    Pair* out = panels;
    for (int64_t j = 0; j < cols; j += kCols, out += panel) {
      const __mmask32 columns = first_halves(cols - j);
      pair_columns(row + j, columns, row + 2 * stride + j, is[2] & columns, out);
      pair_columns(row + stride + j, is[1] & columns, row + 3 * stride + j, is[3] & columns, out + kCols);
    }
  }
}

// The weights' upper halves are their bf16.
inline const Pair* weight_words(const float* p, int64_t rows, Pair* room) {
  const __m512i halves = _mm512_load_si512(kHalves), at = _mm512_add_epi16(_mm512_add_epi16(halves, halves), _mm512_set1_epi16(1));
  for (int64_t i = 0; i < rows * kBlockKeys; i += 32) {
    _mm512_storeu_si512(room + i / 2, _mm512_permutex2var_epi16(_mm512_loadu_si512(p + i), at, _mm512_loadu_si512(p + i + 16)));
  }
  return room;
}

inline const Pair* key_words(const float* p, int64_t rows, int64_t keys, Pair* room) {
  const __m512i upper_half = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int64_t w = 0; w < words_of<Pair>(rows); ++w) {
    const int64_t k = first_of(w);
    for (int64_t j = 0; j < keys; j += 16) {
      const auto row = [&](int64_t i) {
        return i < rows ? _mm512_castps_si512(load_n(p + i * kBlockKeys + j, lanes(keys - j)).v) : _mm512_setzero_si512();
      };
      const __m512i upper = _mm512_and_si512(row(k), upper_half), lower = _mm512_srli_epi32(row(k + 2), 16);
      _mm512_storeu_si512(room + w * kBlockKeys + j, _mm512_or_si512(upper, lower));
    }
  }
  return room;
}

// Words of the last four values hold some that are not seen, where `seen` ends among them: those become zeros in a copy of their block.
template <class Meanwhile>
inline void times_seen(int64_t rows, const Pair* weights, const Pair* panel, float* acc, int64_t ld, int64_t seen, int64_t n,
                       Meanwhile&& meanwhile) {
  using Layout = QueryTile<Pair>;
  const int64_t over = seen % 4;
  if (seen == n || over == 0) return tile_times_panel_n<Layout>(rows, weights, panel, acc, ld, seen, meanwhile);
  const int64_t whole = seen / 32 * 32, words = words_of<Pair>(seen - whole);
  if (whole > 0) tile_times_panel_n<Layout>(rows, weights, panel, acc, ld, whole, meanwhile);
  alignas(64) Pair block[16 * kCols];
  std::memcpy(block, panel + whole / 2 * kCols, static_cast<size_t>(words * kCols) * sizeof(Pair));
  const uint32_t even = over < 3 ? 0xffff0000u : 0xffffffffu, odd = over < 2 ? 0 : 0xffff0000u;
  Pair* last = block + (words - 2) * kCols;
  for (int64_t j = 0; j < kCols; ++j) last[j].halves &= even, last[kCols + j].halves &= odd;
  tile_times_panel_n<Layout>(rows, weights + whole / 32 * Layout::block, block, acc, ld, seen - whole, meanwhile);
}
