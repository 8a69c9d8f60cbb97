// Stored weights -> words of pairs (pairs.h), through tables in registers: a value of 4 or 8 bits becomes its bf16 by vpermi2w or vpermi2b.
//
// Up to four rows of x: four rows of 128 columns of weights at a time. The 128 columns are four blocks of the GEMM tree, whose chains are
// independent of each other; so the sixteen lanes of a register are four blocks x four rows, and transposing takes half a shuffle for 32
// values of 4 bits, one and a half for 8 bits, where lanes of sixteen rows would take four. The words of x are spread out to match, each
// in the four lanes of its block; the sums of the four blocks are added in order afterwards.
// More rows of x: words of sixteen rows of one block, the panel that the other kernels know.
//
// Measured   Zen 5, one row of x, 32 weights from L1: int4 2.0 to 2.1 cycles, int8 2.4 to 2.5, fp8 2.2 to 2.4; from L2 2.1, 3.3, 3.0; from
//            memory, one thread, 24 to 26, 30 to 32 and 32 GB/s of 43. Layers: docs/performance.md
// Included after pairs.h; needs AVX512-VBMI.
#pragma once
#include "cpu/inl/stored_matrix.inl"

constexpr int64_t kGroupBlocks = kScaleGroup / 32;

// bf16 of the values of a byte, by its low seven bits: the lower and the upper half of each.
struct ByteTable {
  alignas(64) uint8_t low[128], high[128];
};

constexpr uint16_t exact_bf16(float value) { return static_cast<uint16_t>(__builtin_bit_cast(uint32_t, value) >> 16); }

constexpr float e4m3_value(int magnitude) {
  if (magnitude == 0x7f) return __builtin_nanf("");
  float value = magnitude < 8 ? static_cast<float>(magnitude) : static_cast<float>(8 + magnitude % 8);
  for (int e = magnitude < 8 ? 1 : magnitude / 8; e < 10; ++e) value *= 0.5f;
  for (int e = 10; e < magnitude / 8; ++e) value *= 2.0f;
  return value;
}

struct E4m3Values {
  alignas(64) float at[128];
};
constexpr E4m3Values e4m3_values() {
  E4m3Values v{};
  for (int i = 0; i < 128; ++i) v.at[i] = e4m3_value(i);
  return v;
}
constexpr E4m3Values kE4m3 = e4m3_values();

template <class Value>
constexpr ByteTable byte_table(Value value) {
  ByteTable t{};
  for (int i = 0; i < 128; ++i) {
    const uint16_t half = exact_bf16(value(i));
    t.low[i] = static_cast<uint8_t>(half & 0xff);
    t.high[i] = static_cast<uint8_t>(half >> 8);
  }
  return t;
}
constexpr ByteTable kE4m3Bytes = byte_table(e4m3_value);
constexpr ByteTable kPositiveBytes = byte_table([](int i) { return static_cast<float>(i); });
constexpr ByteTable kNegativeBytes = byte_table([](int i) { return static_cast<float>(i - 128); });

// Registers [0, 4) of rows, each a dword of 16: dword c of every quarter of the four, side by side.
[[gnu::always_inline]] inline void transpose_quarters(const __m512i (&row)[4], __m512i (&out)[4]) {
  const __m512i a = _mm512_unpacklo_epi32(row[0], row[1]), b = _mm512_unpacklo_epi32(row[2], row[3]);
  const __m512i c = _mm512_unpackhi_epi32(row[0], row[1]), d = _mm512_unpackhi_epi32(row[2], row[3]);
  out[0] = _mm512_unpacklo_epi64(a, b), out[1] = _mm512_unpackhi_epi64(a, b);
  out[2] = _mm512_unpacklo_epi64(c, d), out[3] = _mm512_unpackhi_epi64(c, d);
}

// Quarter q of register g -> quarter g of register q.
[[gnu::always_inline]] inline void exchange_quarters(__m512i (&r)[4]) {
  const __m512i a = _mm512_shuffle_i32x4(r[0], r[1], 0x88), b = _mm512_shuffle_i32x4(r[2], r[3], 0x88);
  const __m512i c = _mm512_shuffle_i32x4(r[0], r[1], 0xdd), d = _mm512_shuffle_i32x4(r[2], r[3], 0xdd);
  r[0] = _mm512_shuffle_i32x4(a, b, 0x88), r[2] = _mm512_shuffle_i32x4(a, b, 0xdd);
  r[1] = _mm512_shuffle_i32x4(c, d, 0x88), r[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
}

constexpr int64_t kScaleLine = 16;  // groups whose scales are widened at a time

// How a format becomes words. `group(scale)` prepares for a group of 128 columns. `pack` brings four rows of it, at p and p + stride, into
// lanes [block][row]: kPacked registers. `expand` calls word(i, P16) for the kWords words in one of them, the next ones of each lane;
// `of` is table(scales) of the four rows, scales [i * kScaleLine] of row i.
template <StoredFormat format>
struct Decoder {
  static constexpr int kPacked = 8, kWords = 2;
  struct Table {};
  __m512i low[2], high[2], negative[2];

  Decoder() {
    const ByteTable& t = format == StoredFormat::int8 ? kPositiveBytes : kE4m3Bytes;
    for (int i = 0; i < 2; ++i) {
      low[i] = _mm512_load_si512(t.low + 64 * i);
      high[i] = _mm512_load_si512(t.high + 64 * i);
      negative[i] = _mm512_load_si512(kNegativeBytes.high + 64 * i);
    }
  }

  void group(const float* scale_of_block) {
    if constexpr (format == StoredFormat::fp8_blocks) {
      const __m512 scale = _mm512_set1_ps(*scale_of_block);
      __m256i lower[4], upper[4];
      for (int i = 0; i < 4; ++i) {
        const __m512 a = _mm512_mul_ps(_mm512_load_ps(kE4m3.at + 32 * i), scale);
        const __m512 b = _mm512_mul_ps(_mm512_load_ps(kE4m3.at + 32 * i + 16), scale);
        const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
        lower[i] = _mm512_cvtepi16_epi8(halves), upper[i] = _mm512_cvtepi16_epi8(_mm512_srli_epi16(halves, 8));
      }
      for (int i = 0; i < 2; ++i) {
        low[i] = _mm512_inserti64x4(_mm512_castsi256_si512(lower[2 * i]), lower[2 * i + 1], 1);
        high[i] = _mm512_inserti64x4(_mm512_castsi256_si512(upper[2 * i]), upper[2 * i + 1], 1);
      }
    }
  }

  Table table(const float*) const { return {}; }

  // Of the dwords of four rows, in each quarter: values k + 2 and k of every row, then k + 3 and k + 1.
  [[gnu::always_inline]] static __m512i ordered(__m512i dwords) {
    return _mm512_shuffle_epi8(dwords, _mm512_broadcast_i32x4(_mm_setr_epi8(2, 0, 6, 4, 10, 8, 14, 12, 3, 1, 7, 5, 11, 9, 15, 13)));
  }

  [[gnu::always_inline]] static void pack(const uint8_t* p, int64_t stride, __m512i* out) {
    __m512i row[4], first[4], second[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) row[i] = _mm512_loadu_si512(p + i * stride);
    transpose_quarters(row, first);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) row[i] = _mm512_loadu_si512(p + i * stride + 64);
    transpose_quarters(row, second);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      out[c] = ordered(_mm512_shuffle_i32x4(first[c], second[c], 0x88));
      out[4 + c] = ordered(_mm512_shuffle_i32x4(first[c], second[c], 0xdd));
    }
  }

  template <class Word>
  [[gnu::always_inline]] void expand(const Table&, __m512i bytes, Word word) const {
    const __m512i lower = _mm512_permutex2var_epi8(low[0], format == StoredFormat::int8 ? _mm512_abs_epi8(bytes) : bytes, low[1]);
    __m512i upper = _mm512_permutex2var_epi8(high[0], bytes, high[1]);
    if constexpr (format == StoredFormat::int8) {
      const __m512i below = _mm512_permutex2var_epi8(negative[0], bytes, negative[1]);
      upper = _mm512_mask_blend_epi8(_mm512_movepi8_mask(bytes), upper, below);
    } else {
      upper = _mm512_ternarylogic_epi32(upper, bytes, _mm512_set1_epi8(static_cast<char>(0x80)), 0x78);  // a ^ (b & c)
    }
    word(0, P16{_mm512_unpacklo_epi8(lower, upper)});
    word(1, P16{_mm512_unpackhi_epi8(lower, upper)});
  }
};

template <>
struct Decoder<StoredFormat::int4> {
  static constexpr int kPacked = 4, kWords = 4;
  // bf16(value * scale) of four rows, 16 words each: the 64 words of a vpermi2w. Bits 4 and 5 of an index are the row.
  struct Table {
    __m512i rows01, rows23;
  };

  void group(const float*) {}

  [[gnu::always_inline]] static Table table(const float* scales) {
    const __m512 values = _mm512_load_ps(kInt4Values);
    const auto row = [&](int i) { return _mm512_mul_ps(values, _mm512_set1_ps(scales[i * kScaleLine])); };
    return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(row(1), row(0))), reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(row(3), row(2)))};
  }

  [[gnu::always_inline]] static void pack(const uint8_t* p, int64_t stride, __m512i* out) {
    __m512i row[4], four[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) row[i] = _mm512_loadu_si512(p + i * stride);
    transpose_quarters(row, four);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) out[i] = four[i];
  }

  template <class Word>
  [[gnu::always_inline]] static void expand(const Table& of, __m512i dwords, Word word) {
    // Where in a qword, two rows' dwords, the words of an index begin: value k + 2 in the lower half, k in the upper.
    const auto where = [](uint64_t low, uint64_t high) {
      return _mm512_set1_epi64(static_cast<long long>(low | high << 16 | (low + 32) << 32 | (high + 32) << 48));
    };
    const __m512i at[4] = {where(8, 0), where(12, 4), where(24, 16), where(28, 20)};
    const __m512i nibble = _mm512_set1_epi16(15), row_of = _mm512_set4_epi32(0x00300030, 0x00200020, 0x00100010, 0);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i index = _mm512_ternarylogic_epi32(_mm512_multishift_epi64_epi8(at[i], dwords), nibble, row_of, 0xea);  // (a & b) | c
      word(i, P16{_mm512_permutex2var_epi16(of.rows01, index, of.rows23)});
    }
  }
};

// Sixteen rows of a stored matrix, group by group: whole ones where they lie, others in a copy whose end is zeros.
template <StoredFormat format>
struct StoredRows {
  const StoredMatrix& m;
  int64_t row, n;
  Decoder<format> decoder;
  alignas(64) float scales[16 * kScaleLine];
  alignas(64) uint8_t padded[16 * kScaleGroup];
  const uint8_t* at;
  int64_t stride;
  const float* scale;

  StoredRows(const StoredMatrix& matrix) : m(matrix) {}

  void begin(int64_t first, int64_t count) { row = first, n = count; }

  void widen_scales(int64_t group) {
    const int64_t groups = (m.depth + kScaleGroup - 1) / kScaleGroup, count = least(kScaleLine, groups - group);
    const int rows = format == StoredFormat::int4 ? 16 : 1;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t from = (format == StoredFormat::int4 ? row + least(i, n - 1) : row / kScaleGroup) * groups + group;
      const int valid = static_cast<int>(count);
      store(scales + i * kScaleLine, m.bf16_scale ? load_n(static_cast<const uint16_t*>(m.scale) + from, valid)
                                                  : load_n(static_cast<const float*>(m.scale) + from, valid));
    }
  }

  // Columns [k, k + 128); k counts up in steps of 128.
  [[gnu::always_inline]] void group(int64_t k, bool first) {
    if constexpr (kScaledValues<format>) {
      const int64_t g = k / kScaleGroup;
      if (first || g % kScaleLine == 0) widen_scales(g / kScaleLine * kScaleLine);
      scale = scales + g % kScaleLine;
      decoder.group(scale);
    }
    stride = stored_bytes<format>(m.depth);
    at = m.values + row * stride + stored_bytes<format>(k);
    if (n < 16 || k + kScaleGroup > m.depth) pad(k);
  }

  [[gnu::noinline]] void pad(int64_t k) {
    constexpr int64_t kRowBytes = stored_bytes<format>(kScaleGroup);
    for (int64_t i = 0; i < 16; ++i) {
      pad_stored<format>(at + least(i, n - 1) * stride, least(kScaleGroup, m.depth - k), kScaleGroup, padded + i * kRowBytes);
    }
    at = padded;
    stride = kRowBytes;
  }

  [[gnu::always_inline]] void pack(int64_t four, __m512i* out) const { Decoder<format>::pack(at + four * 4 * stride, stride, out); }
  [[gnu::always_inline]] auto table(int64_t four) const {
    return decoder.table(kScaledValues<format> ? scale + four * 4 * kScaleLine : nullptr);
  }
};

// One group of sixteen rows as words: word w of block b at out + (b * 16 + w) * ld, `blocks` of them. Rows of bytes share a table, so their
// dwords are transposed before they become words; rows of int4 meet their tables four at a time, and their words are brought together.
template <StoredFormat format>
inline void words_of_group(const StoredRows<format>& rows, int64_t blocks, Pair* out, int64_t ld) {
  for (int64_t first = 0; first < blocks; first += 2) {
    __m512i dword[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) dword[i] = _mm512_loadu_si512(rows.at + i * rows.stride + first * 32);
    transpose_16x16(dword);
#pragma GCC unroll 2
    for (int b = 0; b < 2; ++b) {
      Pair* to = out + (first + b) * 16 * ld;
      if (first + b == blocks) break;
#pragma GCC unroll 8
      for (int d = 0; d < 8; ++d) {
        rows.decoder.expand({}, rows.decoder.ordered(dword[8 * b + d]),
                            [&](int i, P16 word) { _mm512_storeu_si512(to + (2 * d + i) * ld, word.v); });
      }
    }
  }
}

inline void words_of_group(const StoredRows<StoredFormat::int4>& rows, int64_t blocks, Pair* out, int64_t ld) {
  using D = Decoder<StoredFormat::int4>;
  alignas(64) __m512i lanes[16][4];
#pragma GCC unroll 4
  for (int four = 0; four < 4; ++four) {
    const auto table = rows.table(four);
    __m512i packed[D::kPacked];
    rows.pack(four, packed);
#pragma GCC unroll 4
    for (int d = 0; d < D::kPacked; ++d) {
      rows.decoder.expand(table, packed[d], [&](int i, P16 word) { lanes[d * D::kWords + i][four] = word.v; });
    }
  }
  for (int w = 0; w < 16; ++w) {
    __m512i r[4] = {lanes[w][0], lanes[w][1], lanes[w][2], lanes[w][3]};
    exchange_quarters(r);
    for (int64_t b = 0; b < blocks; ++b) _mm512_storeu_si512(out + (b * 16 + w) * ld, r[b]);
  }
}

template <StoredFormat format>
void pack_stored(const StoredMatrix& m, int64_t row, int64_t n, int64_t k, int64_t depth, Pair* out) {
  StoredRows<format> rows(m);
  for (int64_t j = 0; j < kCols; j += 16) {
    if (j >= n) {
      for (int64_t w = 0; w < round_up(depth, 32) / 2; ++w) _mm512_storeu_si512(out + w * kCols + j, _mm512_setzero_si512());
      continue;
    }
    rows.begin(row + j, least(16, n - j));
    for (int64_t at = 0; at < depth; at += kScaleGroup) {
      rows.group(k + at, at == 0);
      words_of_group(rows, (least(kScaleGroup, depth - at) + 31) / 32, out + at / 2 * kCols + j, kCols);
    }
  }
}

// The words of one row of a tile, each four times: word w of the four blocks of a group at out + w * 16.
inline void spread_words(const Pair* row, int64_t depth, Pair* out) {
  const int64_t blocks = (depth + 31) / 32;
  const __m512i fours = _mm512_setr_epi32(0, 0, 0, 0, 16, 16, 16, 16, 0, 0, 0, 0, 16, 16, 16, 16);
  for (int64_t b = 0; b < blocks; b += kGroupBlocks, row += kGroupBlocks * kRows * 16, out += 16 * 16) {
    __m512i block[4];
    for (int i = 0; i < 4; ++i) block[i] = b + i < blocks ? _mm512_loadu_si512(row + i * kRows * 16) : _mm512_setzero_si512();
    for (int w = 0; w < 16; ++w) {
      const __m512i at = _mm512_add_epi32(fours, _mm512_set1_epi32(w));
      const __m512i first = _mm512_permutex2var_epi32(block[0], at, block[1]), second = _mm512_permutex2var_epi32(block[2], at, block[3]);
      _mm512_storeu_si512(out + w * 16, _mm512_mask_blend_epi32(0xff00, first, second));
    }
  }
}

// c [rows][ldc] = rows of x, spread, `x_stride` words apart, @ rows [row, row + cols) of m. kFours times four rows of weights are in
// flight: a chain of vdpbf16ps waits for itself, so there are eight at least.
template <StoredFormat format, int rows>
void rows_times_stored(const StoredMatrix& m, const Pair* spread, int64_t x_stride, int64_t row, int64_t cols, float* c, int64_t ldc,
                       const uint8_t* next) {
  using D = Decoder<format>;
  constexpr int kFours = rows == 1 ? 4 : 2;
  const int64_t row_bytes = stored_bytes<format>(m.depth);
  StoredRows<format> of(m);
  alignas(64) __m512i packed[kFours][D::kPacked];
  for (int64_t j = 0; j < cols; j += 16) {
    FetchLines<4, 1> fetch{reinterpret_cast<const char*>(j + 16 < cols ? m.values + (row + j + 16) * row_bytes : next)};
    of.begin(row + j, least(16, cols - j));
    V16 sum[rows];
    for (int i = 0; i < rows; ++i) sum[i] = zero();
    const Pair* x = spread;
    for (int64_t k = 0; k < m.depth; k += kScaleGroup, x += 16 * 16) {
      if (fetch.at != nullptr) fetch(static_cast<int>(stored_bytes<format>(kScaleGroup) * 16 / 64));
      of.group(k, k == 0);
      __m512i blocks[rows][4];
#pragma GCC unroll 2
      for (int first = 0; first < 4; first += kFours) {
        decltype(of.table(0)) table[kFours];
        V16 chain[kFours][rows][2];
#pragma GCC unroll 4
        for (int f = 0; f < kFours; ++f) {
          of.pack(first + f, packed[f]);
          table[f] = of.table(first + f);
#pragma GCC unroll 4
          for (int i = 0; i < rows; ++i) chain[f][i][0] = chain[f][i][1] = zero();
        }
#pragma GCC unroll 8
        for (int d = 0; d < D::kPacked; ++d) {
#pragma GCC unroll 4
          for (int f = 0; f < kFours; ++f) {
            of.decoder.expand(table[f], packed[f][d], [&](int w, P16 word) {
#pragma GCC unroll 4
              for (int i = 0; i < rows; ++i) {
                V16& sums = chain[f][i][w % 2];
                sums = fma(load(x + i * x_stride + (d * D::kWords + w) * 16), word, sums);
              }
            });
          }
        }
#pragma GCC unroll 4
        for (int f = 0; f < kFours; ++f) {
#pragma GCC unroll 4
          for (int i = 0; i < rows; ++i) blocks[i][first + f] = _mm512_castps_si512(add(chain[f][i][0], chain[f][i][1]).v);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < rows; ++i) {
        exchange_quarters(blocks[i]);
        for (int64_t b = 0; b < 4 && k + b * 32 < m.depth; ++b) sum[i] = add(sum[i], V16{_mm512_castsi512_ps(blocks[i][b])});
      }
    }
    for (int i = 0; i < rows; ++i) store(c + i * ldc + j, sum[i]);
  }
}

template <StoredFormat format, int rows = kRows>
void rows_times_stored_n(int64_t n, const StoredMatrix& m, const Pair* spread, int64_t x_stride, int64_t row, int64_t cols, float* c,
                         int64_t ldc, const uint8_t* next) {
  if constexpr (rows > 1) {
    if (n < rows) return rows_times_stored_n<format, rows - 1>(n, m, spread, x_stride, row, cols, c, ldc, next);
  }
  rows_times_stored<format, rows>(m, spread, x_stride, row, cols, c, ldc, next);
}

// Of one tile the room of the others is free, and holds its words spread out.
template <StoredFormat format>
void tiles_times_stored(const StoredMatrix& m, int64_t rows, Pair* tiles, int64_t tile_words, int64_t row, int64_t cols, float* c,
                        int64_t ldc, const uint8_t* next) {
  if (rows <= kRows) {
    Pair* spread = tiles + tile_words;
    const int64_t x_stride = round_up(m.depth, kScaleGroup) * 2;
    for (int64_t i = 0; i < rows; ++i) spread_words(tiles + i * 16, m.depth, spread + i * x_stride);
    return rows_times_stored_n<format>(rows, m, spread, x_stride, row, cols, c, ldc, next);
  }
  alignas(64) Pair words[kGroupBlocks * 16 * 16];
  alignas(64) float sums[kDirectTiles<Pair> * kRows * 16];
  const int64_t row_bytes = stored_bytes<format>(m.depth);
  StoredRows<format> of(m);
  for (int64_t j = 0; j < cols; j += 16) {
    std::memset(sums, 0, static_cast<size_t>(rows) * 64);
    FetchLines<4, 1> fetch{reinterpret_cast<const char*>(j + 16 < cols ? m.values + (row + j + 16) * row_bytes : next)};
    of.begin(row + j, least(16, cols - j));
    for (int64_t k = 0; k < m.depth; k += kScaleGroup) {
      if (fetch.at != nullptr) fetch(static_cast<int>(stored_bytes<format>(kScaleGroup) * 16 / 64));
      const int64_t blocks = (least(kScaleGroup, m.depth - k) + 31) / 32;
      of.group(k, k == 0);
      words_of_group(of, blocks, words, 16);
      for (int64_t b = 0; b < blocks; ++b) {
        __m512i r[16];
#pragma GCC unroll 16
        for (int w = 0; w < 16; ++w) r[w] = _mm512_load_si512(words + (b * 16 + w) * 16);
        const Pair* a = tiles + (k / 2 + b * 16) * kRows;
        int64_t i = 0;
        for (; i + kRows <= rows; i += kRows, a += tile_words) rows_times_block<kRows>(a, r, sums + 16 * i);
        for (; i < rows; ++i, a += 16) rows_times_block<1>(a, r, sums + 16 * i);
      }
    }
    for (int64_t i = 0; i < rows; ++i) store(c + i * ldc + j, load(sums + 16 * i));
  }
}
