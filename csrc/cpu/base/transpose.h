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

// One block of the GEMM tree: c[i] += (fused chain over even k) + (over odd k) of a[i * 32 + k] with 16 rows of 32 k at p.
template <int rows, class T>
void dot_16x32(const T* p, int64_t stride, const float* a, V16* c) {
  float columns[32 * 16];
  transpose_16x32(p, stride, columns, 16);
  for (int i = 0; i < rows; ++i) {
    V16 chain[2] = {zero(), zero()};
    for (int k = 0; k < 32; ++k) chain[k % 2] = fma(set1(a[i * 32 + k]), load(columns + k * 16), chain[k % 2]);
    c[i] = add(c[i], add(chain[0], chain[1]));
  }
}
