// gx on CUDA. Raw PTX lives here and in hopper_cuda.h alone.
#pragma once
#include <cuda_runtime.h>

#include <cstring>
#include <string>

#include "gpu/gx/fragments.h"

#define GX_DYNAMIC_SHARED(T, name)                                     \
  extern __shared__ __align__(1024) unsigned char gx_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(gx_dynamic_shared)

namespace gx {

inline constexpr glmx::Backend kBackend = glmx::Backend::cuda;
inline constexpr int kWarp = 32;

template <class T>
__device__ inline T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
template <class T>
__device__ inline T shuffle(T v, int source) {
  return __shfl_sync(0xffffffffu, v, source);
}
__device__ inline uint32_t ballot(bool p) { return __ballot_sync(0xffffffffu, p); }
__device__ inline void team_barrier() { __syncwarp(); }
__device__ inline void barrier() { __syncthreads(); }
__device__ inline void barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ inline int barrier_count(bool p) { return __syncthreads_count(p); }

__device__ inline int32_t atomic_add(int32_t* p, int32_t v) { return atomicAdd(p, v); }
__device__ inline void publish(int32_t* p, int32_t v) { asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
__device__ inline int32_t observe(const int32_t* p) {
  int32_t v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ inline void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void wait_for_launches() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void require(bool ok) {
  if (!ok) __trap();
}

__device__ inline float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
__device__ inline float sqrt(float a) { return __fsqrt_rn(a); }

// 1 / d for d in [1, 2^127), and x / d for |x| in [2^-60, 2^60], d in [1, 2^100), |x / d| from 2^-121 on: what the compiler makes of a
// division, without its branch for the other numbers, which would let no two divisions run side by side. bench/gpu/divisions.cu compares.
__device__ inline float approximate_reciprocal(float d) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(d));
  return y;
}
__device__ inline float fma_with_denormals(float a, float b, float c) {
  float r;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(r) : "f"(a), "f"(b), "f"(c));
  return r;
}
__device__ inline float reciprocal(float d) {
  const float y = approximate_reciprocal(d);
  return fma_with_denormals(y, fma_with_denormals(-d, y, 1.0f), y);
}
__device__ inline float quotient(float x, float d) {
  const float y = reciprocal(d), q = x * y;
  return fma_with_denormals(y, fma_with_denormals(-d, q, x), q);
}

// Rounded to nearest even; of two, the first goes to the lower half.
__device__ inline uint16_t bf16_bits(float f) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  return bits;
}
__device__ inline uint32_t pack(float first, float second) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}

__device__ inline Vec16 load16(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
__device__ inline Vec16 load16_once(const void* p) {
  Vec16 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(p));
  return v;
}
__device__ inline void store16(void* p, Vec16 v) { *static_cast<uint4*>(p) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]); }

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ inline void copy_async16(void* to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;  // the rest of the sixteen is written as zeros; nothing is read for them
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
__device__ inline void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ inline void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ inline void load_matrices(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p))
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p))
               : "memory");
}

__device__ inline void mma(FragC& c, const FragA& a, const FragB& b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3])
               : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));
}

inline void check(const char* what, cudaError_t error) { GLMX_CHECK(error == cudaSuccess, what, ": CUDA: ", cudaGetErrorString(error)); }

// Properties of a device that hosts plan with; read once.
struct Properties {
  int multiprocessors, architecture, shared_bytes;
};
const Properties& properties(int index);
int device_count();  // 0 without a driver or a card
std::string device_name(int index);

// More than 48 KB of dynamic shared memory is a kernel's to ask for, once for each device; remembered, since the driver takes its time.
void allow_shared(const char* name, const void* kernel, size_t bytes, int device);

template <class... Params, class... Args>
inline void launch(const char* name, void (*kernel)(Params...), dim3 grid, int block, size_t shared, const glmx::Device& device,
                   const Args&... args) {
  if (grid.x == 0 || grid.y == 0) return;
  if (shared > 48 * 1024) allow_shared(name, reinterpret_cast<const void*>(kernel), shared, device.index);
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(device.stream)>>>(args...);
  check(name, cudaGetLastError());
}
// On cards that have it (programmatic dependent launch, from sm_90 on).
template <class... Params, class... Args>
inline void launch_early(const char* name, void (*kernel)(Params...), dim3 grid, int block, size_t shared, const glmx::Device& device,
                         const Args&... args) {
  if (properties(device.index).architecture < 90) return launch(name, kernel, grid, block, shared, device, args...);
  if (grid.x == 0 || grid.y == 0) return;
  if (shared > 48 * 1024) allow_shared(name, reinterpret_cast<const void*>(kernel), shared, device.index);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(block));
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(device.stream);
  config.attrs = &early;
  config.numAttrs = 1;
  check(name, cudaLaunchKernelEx(&config, kernel, Params(args)...));
}
inline void fill_zero(const char* name, void* p, size_t bytes, const glmx::Device& device) {
  if (bytes > 0) check(name, cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(device.stream)));
}

}  // namespace gx
