// gx, Hopper's own half: bulk tensor copies (TMA), mbarriers, warpgroup matrix products (wgmma), register budgets. CUDA and SIMT have it;
// on HIP, and in CUDA's passes for other chips, kernels of gpu/sm90 have empty bodies (GX_HOPPER is 0).
//
// A *warpgroup* is 128 neighbouring threads that begin at a multiple of 128. Operand tiles lie in shared memory as rows of 128 bytes
// (64 bf16 of k), each group of eight rows (1024 bytes, so aligned) swizzled: byte offset o is stored at o ^ ((o >> 3) & 0x70).
// The same on both:
//   gx::TensorMap                                        passed to a kernel by value as `const __grid_constant__ gx::TensorMap`
//   TensorMap gx::tensor_map(name, base, rows, columns, row_stride, box_rows, box_columns)
//                                                        host: a bf16 matrix, stride in elements; base aligned to 16 bytes, row_stride to 8
//                                                        elements; box_columns is 64, box_rows at most 256. What lies outside reads as 0
//   void gx::tma_load(void* shared, const TensorMap* map, uint64_t* barrier, int column, int row)
//                                                        one thread; shared aligned to 1024; ends as box_rows * 128 bytes on the barrier
//   void gx::prefetch_map(const TensorMap*)
//   void gx::mbarrier_init(uint64_t* b, int arrivals), mbarrier_init_done()   then gx::barrier()
//   void gx::mbarrier_expect(uint64_t* b, int bytes)     arrives once and expects bytes of this phase
//   void gx::mbarrier_arrive(uint64_t* b)
//   void gx::mbarrier_arrive_copies(uint64_t* b)         arrives once all copy_async16 that this thread has issued so far have landed
//   void gx::mbarrier_wait(uint64_t* b, int parity)      until the phase of this parity (0, 1, 0, ...) is complete
//   void gx::fence_async()                               between plain or cp.async writes of shared memory, this thread's or those that a
//                                                        barrier has told it of, and wgmma or TMA
//   uint64_t gx::operand(const void* shared)             descriptor of such a tile at this address; + 32 bytes (the argument) is 16 k on
//   void gx::wgmma_fence(), wgmma_commit(), wgmma_wait<N>()
//   void gx::wgmma<N>(float (&c)[N / 2], uint64_t a, uint64_t b, bool onto)   c[64, N] = (onto ? c : 0) + a[64, 16] b[N, 16]^T;
//                                                        N of 8, 16, 32, 64, 128, 256
//   int gx::wgmma_row(int i), wgmma_col(int i)           of c[i] of this thread
//   void gx::wgmma_hold(float (&c)[n])                   around a run of products: their sums stay in their registers
//   void gx::registers_up<N>(), registers_down<N>()      setmaxnreg of a warpgroup
#pragma once
#include "gpu/gx/gx.h"

#if defined(GX_SIMT)
#define GX_HOPPER 1
#include "gpu/gx/hopper_simt.h"
#elif defined(GX_CUDA)
#include "gpu/gx/hopper_cuda.h"
#endif
