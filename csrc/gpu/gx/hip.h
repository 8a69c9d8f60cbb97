// gx on HIP, for AMD's CDNA chips (waves of 64: gfx90a, gfx942). Not measured on hardware: CI proves that every kernel compiles.
//
// A team is half a wave. A collective of one team may run while the other half of its wave is elsewhere, so each names its team's lanes
// by their place in the wave. Matrix fragments are NVIDIA's, multiplied by plain FMAs: right, and far from the matrix units' speed.
// Compiled with -ffp-contract=off, -fgpu-flush-denormals-to-zero and -fhip-fp32-correctly-rounded-divide-sqrt (cmake/GlmxHip.cmake), so
// `a / b` and gx::sqrt are one rounding and fp32 denormals are flushed, as nvcc's flags have it.
#pragma once
#include <hip/hip_runtime.h>

#include <cstring>
#include <string>

#include "gpu/gx/fragments.h"

#define GX_DYNAMIC_SHARED(T, name)                                                    \
  extern __shared__ __attribute__((aligned(1024))) unsigned char gx_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(gx_dynamic_shared)

namespace gx {

inline constexpr glmx::Backend kBackend = glmx::Backend::hip;
inline constexpr int kWarp = 64;

// Where the team of this thread begins in its wave: 0 or 32.
__device__ inline int team_start() { return static_cast<int>(threadIdx.x) % __builtin_amdgcn_wavefrontsize() / kTeam * kTeam; }

template <class T>
__device__ inline T shuffle(T v, int source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  int word[sizeof(T) / 4];
  __builtin_memcpy(word, &v, sizeof(T));
  for (int& w : word) w = __builtin_amdgcn_ds_bpermute((team_start() + source) * 4, w);  // it wants the lane's byte
  __builtin_memcpy(&v, word, sizeof(T));
  return v;
}
template <class T>
__device__ inline T shuffle_xor(T v, int mask) {
  return shuffle(v, (static_cast<int>(threadIdx.x) % kTeam) ^ mask);
}
__device__ inline uint32_t ballot(bool p) { return static_cast<uint32_t>(__ballot(p) >> team_start()); }
// The lanes of a wave run in step, so it is the compiler alone that must not move memory accesses across.
__device__ inline void team_barrier() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
  __builtin_amdgcn_wave_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}
__device__ inline void barrier() { __syncthreads(); }
__device__ void barrier(int id, int threads) = delete;  // these chips have one barrier a block; only Hopper's kernels use more
__device__ inline int barrier_count(bool p) { return __syncthreads_count(p); }

__device__ inline int32_t atomic_add(int32_t* p, int32_t v) {
  return __hip_atomic_fetch_add(p, v, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}
__device__ inline void publish(int32_t* p, int32_t v) { __hip_atomic_store(p, v, __ATOMIC_RELEASE, __HIP_MEMORY_SCOPE_AGENT); }
__device__ inline int32_t observe(const int32_t* p) { return __hip_atomic_load(p, __ATOMIC_ACQUIRE, __HIP_MEMORY_SCOPE_AGENT); }
__device__ inline void require(bool ok) {
  if (!ok) __builtin_trap();  // the runtime ends the process: HIP has no error that a stream could carry on with
}

__device__ inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
__device__ inline double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
__device__ inline float sqrt(float a) { return __builtin_sqrtf(a); }

using Words = uint32_t __attribute__((ext_vector_type(4)));
__device__ inline Vec16 load16(const void* p) {
  const Words v = *static_cast<const Words*>(p);
  return {{v[0], v[1], v[2], v[3]}};
}
__device__ inline Vec16 load16_once(const void* p) {
  const Words v = __builtin_nontemporal_load(static_cast<const Words*>(p));
  return {{v[0], v[1], v[2], v[3]}};
}
__device__ inline void store16(void* p, Vec16 v) { *static_cast<Words*>(p) = Words{v.word[0], v.word[1], v.word[2], v.word[3]}; }

// Copies go through registers and are done when they return; a kernel's wait() and barrier() order them all the same.
__device__ inline void copy_async16(void* to, const void* from, bool valid) { store16(to, valid ? load16(from) : Vec16{}); }
__device__ inline void commit() {}
template <int N>
__device__ inline void wait() {}

// Fragments hold what NVIDIA's m16n8k16 has in the same lane: of A and C rows lane / 4 and lane / 4 + 8, of B row lane / 4; of k the pairs
// lane % 4 and lane % 4 + 4; of C's columns the pair lane % 4.
// Lane 8 i + j passes the address of row j of the 8 x 8 matrix i, sixteen bytes in shared memory; r[i] becomes this lane's pair of matrix
// i.
using SharedBytes = __attribute__((address_space(3))) const unsigned char*;
__device__ inline SharedBytes shared_row(const void* mine, int lane) {
  return (SharedBytes)shuffle(reinterpret_cast<uint64_t>(mine), lane);  // NOLINT: only this spelling of a cast changes the address space
}
__device__ inline void load_matrices(uint32_t (&r)[4], const void* p) {
  const int lane = static_cast<int>(threadIdx.x) % kTeam;
  for (int i = 0; i < 4; ++i) __builtin_memcpy(&r[i], shared_row(p, i * 8 + lane / 4) + lane % 4 * 4, 4);
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* p) {
  const int lane = static_cast<int>(threadIdx.x) % kTeam;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int half = 0; half < 2; ++half) __builtin_memcpy(&pair[half], shared_row(p, i * 8 + lane % 4 * 2 + half) + lane / 4 * 2, 2);
    r[i] = pair[0] | (uint32_t{pair[1]} << 16);
  }
}

// Sums in the order of k. Every pair of k of a row of A or B is in another lane of the four that share the row. Not unrolled over those:
// the kernels around it would not fit in their registers.
__device__ inline void mma(FragC& c, const FragA& a, const FragB& b) {
  const int lane = static_cast<int>(threadIdx.x) % kTeam;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma nounroll
    for (int pair = 0; pair < 4; ++pair) {
      uint32_t row[2], column[2];
      for (int i = 0; i < 2; ++i) {
        row[i] = shuffle(a.r[half * 2 + i], lane / 4 * 4 + pair);
        column[i] = shuffle(b.r[half], (lane % 4 * 2 + i) * 4 + pair);
      }
      for (int i = 0; i < 4; ++i) {
        const uint32_t x = row[i / 2], w = column[i % 2];
        c.v[i] = fma(__builtin_bit_cast(float, x << 16), __builtin_bit_cast(float, w << 16), c.v[i]);
        c.v[i] = fma(__builtin_bit_cast(float, x & 0xffff0000u), __builtin_bit_cast(float, w & 0xffff0000u), c.v[i]);
      }
    }
  }
}

inline void check(const char* what, hipError_t error) { GLMX_CHECK(error == hipSuccess, what, ": HIP: ", hipGetErrorString(error)); }

// Properties of a device that hosts plan with; read once.
struct Properties {
  int multiprocessors, architecture, shared_bytes;  // architecture: 942 for gfx942, 910 for gfx90a (its letter is a digit of sixteen)
};
const Properties& properties(int index);
int device_count();  // 0 without a driver or a card
std::string device_name(int index);

template <class... Params, class... Args>
inline void launch(const char* name, void (*kernel)(Params...), dim3 grid, int block, size_t shared, const glmx::Device& device,
                   const Args&... args) {
  if (grid.x == 0 || grid.y == 0) return;
  const size_t most = static_cast<size_t>(properties(device.index).shared_bytes);
  GLMX_CHECK(shared <= most, name, ": expected at most ", most, " bytes of shared memory, all that this GPU has for a block: got ", shared);
  kernel<<<grid, block, shared, static_cast<hipStream_t>(device.stream)>>>(args...);
  check(name, hipGetLastError());
}
inline void fill_zero(const char* name, void* p, size_t bytes, const glmx::Device& device) {
  if (bytes > 0) check(name, hipMemsetAsync(p, 0, bytes, static_cast<hipStream_t>(device.stream)));
}

}  // namespace gx
