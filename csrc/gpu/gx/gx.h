// gx: the one vocabulary of every GPU kernel. Behind it: CUDA (cuda.h), HIP (hip.h), a CPU that plays GPU (simt.h).
//
// A kernel is written once, against CUDA's spelling (__global__, __device__, __shared__, __launch_bounds__, threadIdx, blockIdx, blockDim,
// gridDim, dim3) and the names of this file; nothing else differs between the three, and raw PTX or a vendor's builtin lives in gx alone.
//
// Rules of kernels
//   Blocks are one-dimensional (threadIdx.x) and a whole number of kBlockStep = 64 threads; grids may use x and y.
//   A *team* is 32 neighbouring threads, whatever the warp: NVIDIA's warp, half of AMD's wave of 64. Shuffles, ballots and matrix
//   fragments are its; all of its 32 lanes call a collective together, in the same order: a guard like `if (row < rows)` never stands
//   around one. So no result depends on the width of a warp.
//   gx::barrier() is called by every thread of the block that has not ended.
//   Atomics are on integers, and only where the order cannot show.
//   Floating point: `a + b`, `a * b`, `a / b` are one rounding each and never contracted (-fmad=false, -prec-div=true); an FMA is gx::fma.
//   Denormals are flushed on input and output, as on the CPU (-ftz=true).
//
// Collectives and data movement, the same in all three:
//   int      gx::lane(), gx::team()                     threadIdx.x % 32, threadIdx.x / 32
//   T        gx::shuffle_xor(T v, int mask)             v of lane() ^ mask, mask in [0, 32); T of 4 or 8 bytes
//   T        gx::shuffle(T v, int source)               v of lane `source` of the team, source in [0, 32)
//   uint32_t gx::ballot(bool p)                         bit i: p of lane i
//   void     gx::team_barrier(), gx::barrier()          of the team, of the block; both order memory of the block
//   void     gx::barrier(int id, int threads)           of the first `threads` that name `id` (1..15), a multiple of 32
//   int      gx::barrier_count(bool p)                  barrier of the block, and how many threads had p
//   int32_t  gx::atomic_add(int32_t* p, int32_t v)      returns what was there; shared or global memory
//   void     gx::publish(int32_t* p, int32_t v)         store release of the GPU;  gx::observe(p): load acquire
//   void     gx::require(bool ok)                       ends the stream with an error when not: a bad index in a tensor
//   float    gx::fma(a, b, c), gx::sqrt(a)              one rounding; double fma too
//   float    gx::reciprocal(d), gx::quotient(x, d)      divisions without a branch, for the numbers that cuda.h names
//   Vec16    gx::load16(const void*), gx::store16(void*, Vec16)          16 bytes, aligned; load16_once: read once, past L1
//   void     gx::copy_async16(void* shared, const void* global, bool valid)   16 bytes into shared memory, zeros if not valid
//   void     gx::commit(), gx::wait<N>()                close a group of this thread's copies; until at most N groups are open
// Shared memory
//   __shared__ T name[n];                               static
//   GX_DYNAMIC_SHARED(T, name)                          what the launch asked for, aligned to 1024; under SIMT it begins as NaN
// Matrix fragments of a team (m16n8k16, bf16 in, fp32 sums), opaque but for these:
//   FragA, FragB; FragC with v[4] and row(i), col(i) of v[i]
//   load_a, load_a_transposed, load_b_pair, load_b_pair_transposed   from shared memory: each lane passes the address of the 16 bytes that
//                                                                    holds the element named by the helper beside it
//   mma(FragC& c, const FragA& a, const FragB& b)       c += a b^T with a [16, 16], b [8, 16]
// Launch
//   gx::launch(name, kernel, grid, block, shared_bytes, device, args...)   raises glmx::Error with the kernel's name
//   gx::launch_early(...)                               the same, and it may begin as soon as every block of the launch before it has
//   called
//                                                       gx::let_next_begin(); what that launch writes is there after
//                                                       gx::wait_for_launches()
// Hopper's own (tensor maps, mbarrier, wgmma) is in gx/hopper.h.
#pragma once
#include <cstdint>

#include "core/check.h"
#include "glmx/device.h"

namespace gx {
inline constexpr int kTeam = 32, kBlockStep = 64;
struct alignas(16) Vec16 {
  uint32_t word[4];
};
}  // namespace gx

#if defined(GX_SIMT)
#include "gpu/gx/simt.h"
#elif defined(__HIP__)
#define GX_HIP 1
#include "gpu/gx/hip.h"
#elif defined(__CUDACC__)
#define GX_CUDA 1
#include "gpu/gx/cuda.h"
#else
#error "GPU sources are compiled by nvcc, by clang for HIP, or by g++ with -DGX_SIMT"
#endif

// Whether kernels of gpu/sm90 are in this build.
#if defined(GX_CUDA) || defined(GX_SIMT)
#define GX_HOPPER_PATHS 1
#else
#define GX_HOPPER_PATHS 0
#endif

#include "gpu/gx/common.h"
