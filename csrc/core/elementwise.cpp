// copy_elements, gather_rows, add_elements, scale_elements: plain loops.
#include "core/elementwise.h"

#include <bit>
#include <cstring>

#include "core/check.h"

namespace glmx {

namespace {

float widen(uint16_t x) { return std::bit_cast<float>(uint32_t{x} << 16); }

uint16_t narrow(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace

void copy_elements(const CopyParams& p) {
  const bool dense = p.from_strides[3] == 1 && p.to_strides[3] == 1;
  const char* const from = static_cast<const char*>(p.from);
  char* const to = static_cast<char*>(p.to);
  for (int64_t i = 0; i < p.sizes[0]; ++i) {
    for (int64_t j = 0; j < p.sizes[1]; ++j) {
      for (int64_t k = 0; k < p.sizes[2]; ++k) {
        const char* f = from + (i * p.from_strides[0] + j * p.from_strides[1] + k * p.from_strides[2]) * p.bytes;
        char* t = to + (i * p.to_strides[0] + j * p.to_strides[1] + k * p.to_strides[2]) * p.bytes;
        const int64_t n = dense ? 1 : p.sizes[3], length = dense ? p.sizes[3] * p.bytes : p.bytes;
        for (int64_t l = 0; l < n; ++l) {
          std::memcpy(t + l * p.to_strides[3] * p.bytes, f + l * p.from_strides[3] * p.bytes, static_cast<size_t>(length));
        }
      }
    }
  }
}

void gather_rows(const GatherParams& p) {
  for (int64_t r = 0; r < p.n; ++r) {
    const int64_t row = p.rows[r];
    GLMX_CHECK(row >= 0 && row < p.from_rows, "gather_rows: expected a row in [0, ", p.from_rows, "): got ", row, " at ", r);
    std::memcpy(static_cast<char*>(p.to) + r * p.row_bytes, static_cast<const char*>(p.from) + row * p.row_bytes,
                static_cast<size_t>(p.row_bytes));
  }
}

void add_elements(const AddParams& p) {
  if (p.dtype == DType::bf16) {
    const uint16_t *a = static_cast<const uint16_t*>(p.a), *b = static_cast<const uint16_t*>(p.b);
    for (int64_t i = 0; i < p.n; ++i) static_cast<uint16_t*>(p.out)[i] = narrow(widen(a[i]) + widen(b[i]));
  } else {
    const float *a = static_cast<const float*>(p.a), *b = static_cast<const float*>(p.b);
    for (int64_t i = 0; i < p.n; ++i) static_cast<float*>(p.out)[i] = a[i] + b[i];
  }
}

void scale_elements(const ScaleParams& p) {
  for (int64_t i = 0; i < p.n; ++i) p.out[i] = p.x[i] * p.factor;
}

}  // namespace glmx
