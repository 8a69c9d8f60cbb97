// silu_mul: y[t,i] = silu(gate[t,i]) * up[t,i], the SwiGLU activation; backward to gate and up
// Contract   include/glmx/ops.h SiluMulParams   Oracle reference/silu_mul.py   Doc docs/ops/silu_mul.md
// Shapes     x, dx [T,2I] dtype row-major, gate columns then up columns | y, dy [T,I] dtype
// Layout     one pass; tails run the same code on masked lanes
// Numerics   fp32 inside (exp16 of vec_math.inl, exact division), one rounding; silu_mul16 is also grouped_gemm's epilogue
// Algorithm  one work item = 16 rows; every element stands alone
// Work/bytes about 20*T*I flop forward; 3*T*I elements (backward 5*T*I): exp and memory are about even
// Measured   1.0 ns per output (bf16, 4096 x 768), backward 1.3; AVX2 2.4 and 2.9: one thread of a shared Zen 4 machine, processor time
// Limits     I >= 1; host checks in ops/silu_mul.cpp
#include "cpu/inl/rows.inl"
#include "cpu/inl/vec_math.inl"

constexpr int64_t kSiluRows = 16;

template <class T>
void silu_mul_block(void* context, int64_t block) {
  const SiluMulParams& p = *static_cast<const SiluMulParams*>(context);
  const int64_t end = min_i64(p.T, (block + 1) * kSiluRows);
  for (int64_t t = block * kSiluRows; t < end; ++t) {
    const T* gate = static_cast<const T*>(p.x) + t * 2 * p.I;
    T* y = static_cast<T*>(p.y) + t * p.I;
    for (int64_t i = 0; i < p.I; i += 16) {
      const int n = lanes(p.I - i);
      fetch_ahead(gate + i), fetch_ahead(gate + p.I + i);
      store_n(y + i, silu_mul16(load_n(gate + i, n), load_n(gate + p.I + i, n)), n);
    }
  }
}

inline void silu_mul_rows(const SiluMulParams& p) {
  const int64_t blocks = (p.T + kSiluRows - 1) / kSiluRows;
  parallel_items(blocks, p.T * p.I * 2, p.dtype == DType::bf16 ? silu_mul_block<uint16_t> : silu_mul_block<float>,
                 const_cast<SiluMulParams*>(&p));
}

// With s = sigmoid(gate):  d_gate = dy * up * s * (1 + gate * (1 - s)),  d_up = dy * gate * s.
template <class T>
void silu_mul_backward_block(void* context, int64_t block) {
  const SiluMulBackwardParams& p = *static_cast<const SiluMulBackwardParams*>(context);
  const V16 one = set1(1.0f);
  const int64_t end = min_i64(p.T, (block + 1) * kSiluRows);
  for (int64_t t = block * kSiluRows; t < end; ++t) {
    const T* x = static_cast<const T*>(p.x) + t * 2 * p.I;
    const T* dy = static_cast<const T*>(p.dy) + t * p.I;
    T* dx = static_cast<T*>(p.dx) + t * 2 * p.I;
    for (int64_t i = 0; i < p.I; i += 16) {
      const int n = lanes(p.I - i);
      fetch_ahead(x + i), fetch_ahead(x + p.I + i), fetch_ahead(dy + i);
      const V16 gate = load_n(x + i, n), up = load_n(x + p.I + i, n), grad = load_n(dy + i, n);
      const V16 s = sigmoid16(gate);
      const V16 slope = mul(s, fma(gate, sub(one, s), one));
      store_n(dx + i, mul(mul(grad, up), slope), n);
      store_n(dx + p.I + i, mul(grad, mul(gate, s)), n);
    }
  }
}

inline void silu_mul_backward_rows(const SiluMulBackwardParams& p) {
  const int64_t blocks = (p.T + kSiluRows - 1) / kSiluRows;
  parallel_items(blocks, p.T * p.I * 3, p.dtype == DType::bf16 ? silu_mul_backward_block<uint16_t> : silu_mul_backward_block<float>,
                 const_cast<SiluMulBackwardParams*>(&p));
}
