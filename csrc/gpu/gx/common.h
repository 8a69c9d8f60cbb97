// What is the same behind all three implementations, made of their primitives: bf16, sixteen-lane rows, folds.
#pragma once
#include "gpu/gx/gx.h"

namespace gx {

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % kTeam; }
__device__ inline int team() { return static_cast<int>(threadIdx.x) / kTeam; }

__device__ inline float from_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
__device__ inline uint32_t to_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

// bf16 is held as its bits. Rounding is to nearest even; NaN stays NaN (quiet bit set), as csrc/cpu/base/vec.h does it.
__device__ inline float load(const uint16_t* p) { return from_bits(uint32_t{*p} << 16); }
__device__ inline float load(const float* p) { return *p; }
#if !defined(GX_CUDA)  // it has an instruction (cuda.h), whose NaN are all one
__device__ inline uint16_t bf16_bits(float f) {
  const uint32_t bits = to_bits(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
#endif
__device__ inline void store(uint16_t* p, float f) { *p = bf16_bits(f); }
__device__ inline void store(float* p, float f) { *p = f; }
// The value that storing as T and loading again gives.
template <class T>
__device__ inline float round_to(float f);
template <>
__device__ inline float round_to<float>(float f) {
  return f;
}
template <>
__device__ inline float round_to<uint16_t>(float f) {
  return from_bits(uint32_t{bf16_bits(f)} << 16);
}

// Two bf16 of a word, the lower address first.
__device__ inline float low(uint32_t word) { return from_bits(word << 16); }
__device__ inline float high(uint32_t word) { return from_bits(word & 0xffff0000u); }
#if !defined(GX_CUDA)
__device__ inline uint32_t pack(float first, float second) { return bf16_bits(first) | (uint32_t{bf16_bits(second)} << 16); }
#endif

// Row sums of ops.h: sixteen lanes, half a team. Lane j holds the chain of elements j, j + 16, ...; the fold is 16 -> 8 -> 4 -> 2 -> 1,
// lane j + lane j + half; every lane of the half team receives it. Both halves of the team call together.
inline constexpr int kRowLanes = 16;
__device__ inline float fold_add(float v) {
  for (int half = kRowLanes / 2; half > 0; half /= 2) v = v + shuffle_xor(v, half);
  return v;
}

#if !defined(GX_CUDA)  // cuda.h says for which numbers
__device__ inline float reciprocal(float d) { return 1.0f / d; }
__device__ inline float quotient(float x, float d) { return x / d; }
#endif

#if !defined(GX_CUDA)  // launches of a stream run one after the other
__device__ inline void let_next_begin() {}
__device__ inline void wait_for_launches() {}
template <class... Params, class... Args>
inline void launch_early(const char* name, void (*kernel)(Params...), dim3 grid, int block, size_t shared, const glmx::Device& device,
                         const Args&... args) {
  launch(name, kernel, grid, block, shared, device, args...);
}
#endif

#if !defined(GX_SIMT)  // there each says where in the kernel it was called
__device__ inline void load_a(FragA& a, const void* p) { load_matrices(a.r, p); }
__device__ inline void load_a_transposed(FragA& a, const void* p) { load_matrices_transposed(a.r, p); }
__device__ inline void load_b_pair(FragB (&b)[2], const void* p) {
  uint32_t r[4];
  load_matrices(r, p);
  b[0] = {{r[0], r[1]}};
  b[1] = {{r[2], r[3]}};
}
__device__ inline void load_b_pair_transposed(FragB (&b)[2], const void* p) {
  uint32_t r[4];
  load_matrices_transposed(r, p);
  b[0] = {{r[0], r[1]}};
  b[1] = {{r[2], r[3]}};
}
#endif

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace gx
