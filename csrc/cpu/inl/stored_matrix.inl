// A matrix of stored weights (StoredWeights of ops.h), as its kernels see it. Included inside an anonymous namespace.
#pragma once
#include "cpu/inl/sizes.inl"

// Rows of one matrix; a row of int4 is whole words.
struct StoredMatrix {
  const uint8_t* values;
  const void* scale;
  int64_t rows, depth;
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
