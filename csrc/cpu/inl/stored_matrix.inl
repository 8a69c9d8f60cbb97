// A matrix of stored weights (StoredWeights of ops.h), as its kernels see it, and its values as bf16.
// Included after vec.h and the ISA's stored.h, inside their anonymous namespace.
#pragma once
#include "cpu/inl/sizes.inl"

// One matrix; a row of int4 is whole words.
struct StoredMatrix {
  const uint8_t* values;
  const void* scale;
  int64_t depth;
  bool bf16_scale;
};

template <StoredFormat format>
constexpr int64_t stored_bytes(int64_t values) {
  return format == StoredFormat::int4 ? (values + 7) / 8 * 4 : values;
}

// Whether each value meets a scale before it is a weight; else the scale waits for the row's sum.
template <StoredFormat format>
constexpr bool kScaledValues = format == StoredFormat::int4 || format == StoredFormat::fp8_blocks;

inline float stored_scale(const StoredMatrix& m, int64_t i) {
  if (!m.bf16_scale) return static_cast<const float*>(m.scale)[i];
  const uint32_t bits = uint32_t{static_cast<const uint16_t*>(m.scale)[i]} << 16;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return scale;
}

// Of the value in row `row`, column k.
template <StoredFormat format>
float stored_scale_at(const StoredMatrix& m, int64_t row, int64_t k) {
  const int64_t groups = (m.depth + kScaleGroup - 1) / kScaleGroup;
  return stored_scale(m, (format == StoredFormat::int4 ? row : row / kScaleGroup) * groups + k / kScaleGroup);
}

// `values` values of a row, of which `valid` are there, the rest zeros: a copy to read whole vectors from.
template <StoredFormat format>
void pad_stored(const uint8_t* from, int64_t valid, int64_t values, uint8_t* out) {
  std::memset(out, format == StoredFormat::int4 ? 0x88 : 0, static_cast<size_t>(stored_bytes<format>(values)));
  if (format != StoredFormat::int4) {
    std::memcpy(out, from, static_cast<size_t>(valid));
  } else if (valid > 0) {
    std::memcpy(out, from, static_cast<size_t>((valid + 1) / 2));
    if (valid % 2 != 0) out[valid / 2] = static_cast<uint8_t>((out[valid / 2] & 0x0f) | 0x80);
  }
}

inline StoredMatrix stored_matrix(const GroupedGemmParams& p, int64_t e, int64_t half) {
  const int64_t parts = p.silu_mul ? 2 : 1, i = e * parts + half;
  return {reinterpret_cast<const uint8_t*>(p.stored.table[i]), reinterpret_cast<const void*>(p.stored.table[p.E * parts + i]), p.K,
          p.stored.scale_dtype == DType::bf16};
}

// Eight e4m3 of exponent 0, eight of exponent 7. The others are the latter times a power of two, and so are their products with a scale
// that leaves those inside of fp32's exponents.
alignas(64) constexpr float kE4m3Values[16] = {0,      0x1p-9f, 0x2p-9f, 0x3p-9f, 0x4p-9f, 0x5p-9f, 0x6p-9f, 0x7p-9f,
                                               1.000f, 1.125f,  1.250f,  1.375f,  1.500f,  1.625f,  1.750f,  1.875f};
inline bool ordinary(float scale) {
  const float size = scale < 0 ? -scale : scale;
  return size > 0x1p-100f && size < 0x1p100f;
}

alignas(64) constexpr float kInt4Values[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

// Rows [row, row + n) of 16, columns [k, k + depth) of one group -> bf16 [16][stride], zeros to the next multiple of 32 columns.
template <StoredFormat format>
void widen_stored(const StoredMatrix& m, int64_t row, int64_t n, int64_t k, int64_t depth, uint16_t* out, int64_t stride) {
  for (int64_t i = 0; i < 16; ++i, out += stride) {
    if (i >= n) {
      std::memset(out, 0, static_cast<size_t>(round_up(depth, 32)) * 2);
      continue;
    }
    const uint8_t* p = m.values + (row + i) * stored_bytes<format>(m.depth) + stored_bytes<format>(k);
    const float scale = kScaledValues<format> ? stored_scale_at<format>(m, row + i, k) : 1.0f;
    const float at_once = ordinary(scale) ? scale : 1.0f;
    [[maybe_unused]] const Int4Table int4 = int4_table(mul(load(kInt4Values), set1(scale)));
    [[maybe_unused]] const E4m3Table e4m3 = e4m3_table(mul(load(kE4m3Values), set1(at_once)), at_once);
    for (int64_t j = 0; j < depth; j += 32, p += stored_bytes<format>(32)) {
      alignas(32) uint8_t padded[32];
      const uint8_t* from = p;
      if (depth - j < 32) {
        pad_stored<format>(p, depth - j, 32, padded);
        from = padded;
      }
      if constexpr (format == StoredFormat::int4) {
        widen_int4(from, int4, out + j);
      } else if constexpr (format == StoredFormat::int8) {
        widen_int8(from, out + j);
      } else {
        widen_e4m3(from, e4m3, out + j);
        if (at_once != scale) {
          store(out + j, mul(load(out + j), set1(scale)));
          store(out + j + 16, mul(load(out + j + 16), set1(scale)));
        }
      }
    }
  }
}
