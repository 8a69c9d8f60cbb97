// What happens to a block of fp32 results before it is stored: bias, silu_mul, rounding, accumulation. The vector kernels and the AMX
// kernels store through these functions, so that their bits agree. Included after vec.h, in its anonymous namespace.
#include "cpu/inl/sizes.inl"
#include "cpu/inl/vec_math.inl"

// Where a matrix of either dtype that begins at `base` has its head.
inline void* head_of(void* base, DType dtype, int64_t elements) {
  return static_cast<char*>(base) + elements * (dtype == DType::bf16 ? 2 : 4);
}

// Row `row` of a [*, width] matrix of either dtype, columns [col, col + cols), from c; add: onto what is there.
inline void store_row(void* matrix, DType dtype, int64_t width, int64_t row, int64_t col, int64_t cols, const float* c, bool add_to) {
  if (dtype == DType::bf16) {
    uint16_t* out = static_cast<uint16_t*>(matrix) + row * width + col;
    for (int64_t j = 0; j < cols; j += 16) store_n(out + j, load(c + j), lanes(cols - j));
    return;
  }
  float* out = static_cast<float*>(matrix) + row * width + col;
  for (int64_t j = 0; j < cols; j += 16) {
    const int n = lanes(cols - j);
    const V16 a = load(c + j);
    store_n(out + j, add_to ? add(load_n(out + j, n), a) : a, n);
  }
}

inline void zero_rows(void* matrix, DType dtype, int64_t width, int64_t begin, int64_t end) {
  const int64_t size = dtype == DType::bf16 ? 2 : 4;
  std::memset(static_cast<char*>(matrix) + begin * width * size, 0, static_cast<size_t>((end - begin) * width * size));
}

// c[0..cols) += bias[e, col..): fp32.
inline void add_bias(const GroupedGemmParams& p, int64_t e, int64_t col, int64_t cols, float* c) {
  for (int64_t j = 0; j < cols; j += 16) {
    const int n = lanes(cols - j);
    const int64_t at = e * p.N + col + j;
    const V16 b =
        p.dtype == DType::bf16 ? load_n(static_cast<const uint16_t*>(p.bias) + at, n) : load_n(static_cast<const float*>(p.bias) + at, n);
    store(c + j, add(load(c + j), b));
  }
}

// c[0..cols) *= the scales of rows [row, row + cols) of a stored matrix.
inline void scale_sums(const GroupedGemmParams& p, int64_t matrix, int64_t row, int64_t cols, float* c) {
  const int64_t scales = p.stored.table[p.E * (p.silu_mul ? 2 : 1) + matrix];
  for (int64_t j = 0; j < cols; j += 16) {
    const int n = lanes(cols - j);
    const V16 scale = p.stored.scale_dtype == DType::bf16 ? load_n(reinterpret_cast<const uint16_t*>(scales) + row + j, n)
                                                          : load_n(reinterpret_cast<const float*>(scales) + row + j, n);
    store(c + j, mul(load(c + j), scale));
  }
}

// One row of forward results: columns [col, col + cols) of the output. c holds them (with silu_mul: the gate; up holds the other half).
// c and up are whole vectors of 16 and are overwritten.
inline void store_forward(const GroupedGemmParams& p, int64_t e, int64_t row, int64_t col, int64_t cols, float* c, float* up) {
  if (p.stored.table != nullptr && (p.stored.format == StoredFormat::int8 || p.stored.format == StoredFormat::fp8)) {
    scale_sums(p, p.silu_mul ? 2 * e : e, col, cols, c);
    if (p.silu_mul) scale_sums(p, 2 * e + 1, col, cols, up);
  }
  if (p.bias != nullptr) add_bias(p, e, col, cols, c);
  if (!p.silu_mul) {
    store_row(p.out, p.out_dtype, p.N, row, col, cols, c, false);
    return;
  }
  const int64_t half = p.N / 2;
  if (p.bias != nullptr) add_bias(p, e, half + col, cols, up);
  if (p.preact != nullptr) {
    store_row(p.preact, p.dtype, p.N, row, col, cols, c, false);
    store_row(p.preact, p.dtype, p.N, row, half + col, cols, up, false);
  }
  for (int64_t j = 0; j < cols; j += 16) store(c + j, mul(silu16(load(c + j)), load(up + j)));
  store_row(p.out, p.out_dtype, half, row, col, cols, c, false);
}

inline void zero_forward(const GroupedGemmParams& p, int64_t begin, int64_t end) {
  zero_rows(p.out, p.out_dtype, p.silu_mul ? p.N / 2 : p.N, begin, end);
  if (p.preact != nullptr) zero_rows(p.preact, p.dtype, p.N, begin, end);
}
