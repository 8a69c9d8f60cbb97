// What a recording does in place of torch's own copies, gathers, sums and products inside a model, bit for bit as torch does it.
// Not ops: nothing but a recording calls them, on the few rows of a forward that is worth recording.
#pragma once
#include <cstdint>

#include "glmx/dtype.h"

namespace glmx {

// Elements of `bytes` (1, 2, 4 or 8) at to[i . to_strides] = from[i . from_strides], strides in elements.
inline constexpr int kCopyDims = 4;
struct CopyParams {
  const void* from;
  void* to;
  int64_t sizes[kCopyDims], from_strides[kCopyDims], to_strides[kCopyDims];
  int64_t bytes;
};
void copy_elements(const CopyParams& p);

// Row r of `to` is row rows[r] of `from`; an error where there is none.
struct GatherParams {
  const void* from;     // [from_rows, row_bytes]
  const int64_t* rows;  // [n] in [0, from_rows)
  void* to;             // [n, row_bytes]
  int64_t n, from_rows, row_bytes;
};
void gather_rows(const GatherParams& p);

// out = a + b in fp32, rounded once to dtype. Denormals are kept.
struct AddParams {
  const void* a;  // [n] dtype
  const void* b;  // [n] dtype
  void* out;      // [n] dtype
  int64_t n;
  DType dtype;  // fp32 or bf16
};
void add_elements(const AddParams& p);

// out = x * factor.
struct ScaleParams {
  const float* x;  // [n]
  float* out;      // [n]
  int64_t n;
  float factor;
};
void scale_elements(const ScaleParams& p);

}  // namespace glmx
