// gx on a CPU that plays GPU, Hopper's half (hopper.h says what each name does).
//
// Bulk copies overwrite their destination with NaN when issued and deliver when no thread of the block can run without them; products end,
// after all copies, when no thread can run without their sums, which are NaN until the wgmma_wait() that names them. What a launch fails
// for, besides what simt.h lists: an mbarrier that was not initialised, or whose initialisation no fence covered; more arrivals or bytes
// than it expects; bulk copies that are not aligned, that leave shared memory, or that are in flight when the block ends; operands with a
// wrong descriptor, outside dynamic shared memory, or written by a thread (store16, cp.async) without a fence_async() since; products
// without wgmma_fence() or that are never waited for; sums or operands that change under products in flight; threads of a warpgroup whose
// products differ. Plain stores (`shared[i] = x`) are not tracked for fence_async().
#pragma once
#include "gpu/gx/gx.h"

namespace gx {

struct alignas(64) TensorMap {
  const uint16_t* base;
  int64_t rows, columns, row_stride;
  int box_rows, box_columns;
};
TensorMap tensor_map(const char* name, const void* base, int64_t rows, int64_t columns, int64_t row_stride, int box_rows, int box_columns);

inline void prefetch_map(const TensorMap*) {}
void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, int column, int row);

void mbarrier_init(uint64_t* b, int arrivals);
void mbarrier_init_done();
void mbarrier_expect(uint64_t* b, int bytes);
void mbarrier_arrive(uint64_t* b);
void mbarrier_arrive_copies(uint64_t* b);
void mbarrier_wait(uint64_t* b, int parity, simt::Site site = simt::Site::current());

void fence_async();
uint64_t operand(const void* shared);
void wgmma_fence();
void wgmma_commit();
template <int N>
inline void wgmma_hold(float (&)[N]) {}
inline int wgmma_row(int i) {
  return static_cast<int>(threadIdx.x) % 128 / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4 + i / 2 % 2 * 8;
}
inline int wgmma_col(int i) { return i / 4 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2; }

namespace simt {
void wgmma(float* c, int n, uint64_t a, uint64_t b, bool onto);
void wgmma_wait(int groups, const Site& site);
}  // namespace simt
template <int N>
inline void wgmma(float (&c)[N / 2], uint64_t a, uint64_t b, bool onto) {
  static_assert(N == 8 || N == 16 || N == 32 || N == 64 || N == 128 || N == 256);
  simt::wgmma(c, N, a, b, onto);
}
template <int N>
inline void wgmma_wait(simt::Site site = simt::Site::current()) {
  simt::wgmma_wait(N, site);
}

template <int N>
inline void registers_up() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
}
template <int N>
inline void registers_down() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
}

}  // namespace gx
