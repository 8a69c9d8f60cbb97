// transpose_16x32 / base: 16 rows of 32 elements -> 32 rows of 16 fp32. Included after vec.h.

// out[k * out_stride + lane] = p[lane * stride + k]
template <class T>
void transpose_16x32(const T* p, int64_t stride, float* out, int64_t out_stride) {
  for (int lane = 0; lane < 16; ++lane) {
    for (int k = 0; k < 32; k += 16) {
      float row[16];
      store(row, load(p + lane * stride + k));
      for (int i = 0; i < 16; ++i) out[(k + i) * out_stride + lane] = row[i];
    }
  }
}
