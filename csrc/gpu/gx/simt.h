// gx on a CPU that plays GPU: every kernel runs here, in CI, with no GPU. What it proves is order and synchronisation; what it cannot prove
// is a GPU's own rounding, its fences and its speed.
//
// A block's threads are fibers of one OS thread; blocks spread over glmx's pool of threads (simt.cpp has the scheduler). It is a hard
// master rather than a fast one:
//   thread order    forward, reverse, or random: set_order(), or GLMX_BACKEND=simt:random:7. Blocks follow the same order.
//   late            an asynchronous copy overwrites its destination with NaN when it is issued and delivers when it must: at the wait that
//                   names it. So reading too early, and reusing a buffer too early, both show as NaN.
//   poison          shared memory, dynamic and static, is NaN (all bits set) when a block begins.
//   faults          deadlock, lanes of a team at different collectives, a barrier's wrong id or count, addresses that are not in shared
//                   memory or not aligned. launch() raises glmx::Error, and its text names the kernel, the block and the threads.
//   sums            each family of matrix instructions adds in an order of its own: mma upwards in k, wgmma downwards in pairs
//                   (hopper_simt.h), so that a kernel which mixes families fails the tests of chunk invariance.
// What it does not see: a shuffle orders memory here as a team barrier does; visibility between blocks is the CPU's.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstring>
#include <source_location>
#include <string>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __forceinline__ inline __attribute__((always_inline))
// One copy for each OS thread, which runs one block at a time. A library of kernels has no other thread_local: simt.cpp poisons them all.
#define __shared__ static thread_local
#define threadIdx (::gx::simt::self().index)
#define blockIdx (::gx::simt::self().block->index)
#define blockDim (::gx::simt::self().block->threads)
#define gridDim (::gx::simt::self().block->grid)
#define GX_DYNAMIC_SHARED(T, name) T* const name = reinterpret_cast<T*>(::gx::simt::self().block->dynamic_shared)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// The width of a warp: 32 (NVIDIA, RDNA) or 64 (CDNA). A constant of the build, since kernels may size arrays with gx::kWarp.
#ifndef GX_SIMT_WARP
#define GX_SIMT_WARP 32
#endif

namespace gx {

inline constexpr glmx::Backend kBackend = glmx::Backend::simt;
inline constexpr int kWarp = GX_SIMT_WARP;
static_assert(kWarp == 32 || kWarp == 64);

namespace simt {

enum class Order { forward, reverse, random };
void set_order(Order order, uint64_t seed = 1);
void set_architecture(int architecture);  // 80 or 90: what properties(0) says

struct Block {
  dim3 index, threads, grid;
  unsigned char* dynamic_shared;
  bool hopper;  // it has mbarriers: what the async proxy may not see yet is followed
};
struct Thread {
  dim3 index;
  Block* block;
};

// Stacks are aligned to their size, and the Thread lies near the top of its own: the stack pointer alone finds it. Its distance from the
// top differs from stack to stack: were it the same, the hot lines of all threads would compete for the same few sets of the caches.
#if defined(__SANITIZE_ADDRESS__)
inline constexpr uintptr_t kStackBytes = 256 << 10;
#else
inline constexpr uintptr_t kStackBytes = 64 << 10;
#endif
inline constexpr uintptr_t kHeaderBytes = 192;  // room for the scheduler's own part of a thread
inline constexpr uintptr_t kHeaderPlaces = 128;
inline uintptr_t header_of(uintptr_t stack) {
  const uintptr_t place = stack / kStackBytes % kHeaderPlaces;
  return (stack | (kStackBytes - 1)) + 1 - (place + 1) * kHeaderBytes;
}
__attribute__((always_inline)) inline Thread& self() {
  uintptr_t stack;
  asm("mov %%rsp, %0" : "=r"(stack));
  return *reinterpret_cast<Thread*>(header_of(stack));
}

// Ends the launch with an error that begins with the kernel, the block and the thread.
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Where in the source a thread calls; a default argument, so that it names the caller's line.
using Site = std::source_location;

// All 32 lanes of a team come from the same site with the same `run` (the lane that is last calls it with the arguments of all); else it is
// a fault.
void collective(const char* what, const Site& site, void (*run)(void* const* lanes), void* mine);
// Barrier `id` of `threads` threads (0: all that have not ended), all from the same site. Returns how many came with p.
int block_barrier(const char* what, const Site& site, int id, int threads, bool p);
void copy_async16(void* to, const void* from, bool valid);
void commit();
void wait(int groups);
// Lets every other thread of the block run, and other blocks: of one that polls memory.
void pause();
// Remembers a store to shared memory that fence_async() has to cover.
void note_store16(const void* p);
// Faults unless [p, p + bytes) is shared memory of this block and p is aligned.
void check_shared(const char* what, const void* p, size_t bytes, size_t alignment);

void launch(const char* name, void (*body)(const void* context), const void* context, dim3 grid, int block, size_t shared);

}  // namespace simt

// ---- Collectives of a team ------------------------------------------------------------------------------------------------------------

template <class T>
inline T shuffle_xor(T v, int mask, simt::Site site = simt::Site::current()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  struct Lane {
    T v, out;
    int mask;
  } mine{v, v, mask};
  if (mask < 0 || mask >= kTeam) simt::fault("shuffle_xor: mask %d is not in [0, 32)", mask);
  simt::collective(
      "shuffle_xor", site,
      [](void* const* lanes) {
        for (int i = 0; i < kTeam; ++i) {
          Lane& to = *static_cast<Lane*>(lanes[i]);
          to.out = static_cast<Lane*>(lanes[i ^ to.mask])->v;
        }
      },
      &mine);
  return mine.out;
}
template <class T>
inline T shuffle(T v, int source, simt::Site site = simt::Site::current()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  struct Lane {
    T v, out;
    int source;
  } mine{v, v, source};
  if (source < 0 || source >= kTeam) simt::fault("shuffle: source %d is not in [0, 32)", source);
  simt::collective(
      "shuffle", site,
      [](void* const* lanes) {
        for (int i = 0; i < kTeam; ++i) {
          Lane& to = *static_cast<Lane*>(lanes[i]);
          to.out = static_cast<Lane*>(lanes[to.source])->v;
        }
      },
      &mine);
  return mine.out;
}
inline uint32_t ballot(bool p, simt::Site site = simt::Site::current()) {
  struct Lane {
    bool p;
    uint32_t out;
  } mine{p, 0};
  simt::collective(
      "ballot", site,
      [](void* const* lanes) {
        uint32_t bits = 0;
        for (int i = 0; i < kTeam; ++i) bits |= uint32_t{static_cast<Lane*>(lanes[i])->p} << i;
        for (int i = 0; i < kTeam; ++i) static_cast<Lane*>(lanes[i])->out = bits;
      },
      &mine);
  return mine.out;
}
inline void team_barrier(simt::Site site = simt::Site::current()) {
  simt::collective("team_barrier", site, [](void* const*) {}, nullptr);
}

inline void barrier(simt::Site site = simt::Site::current()) { simt::block_barrier("barrier()", site, 0, 0, false); }
inline void barrier(int id, int threads, simt::Site site = simt::Site::current()) {
  if (id < 1 || id > 15) simt::fault("barrier(%d, %d): the id is not in [1, 15]", id, threads);
  if (threads < kTeam || threads % kTeam != 0) simt::fault("barrier(%d, %d): the threads are not a multiple of 32", id, threads);
  simt::block_barrier("barrier(id, threads)", site, id, threads, false);
}
inline int barrier_count(bool p, simt::Site site = simt::Site::current()) { return simt::block_barrier("barrier_count()", site, 0, 0, p); }

// ---- Memory ---------------------------------------------------------------------------------------------------------------------------

inline int32_t atomic_add(int32_t* p, int32_t v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
inline void publish(int32_t* p, int32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
inline int32_t observe(const int32_t* p) {
  simt::pause();
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
inline void require(bool ok) {
  if (!ok) simt::fault("require(): a value that a tensor may not hold");
}

inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline double fma(double a, double b, double c) { return std::fma(a, b, c); }
inline float sqrt(float a) { return std::sqrt(a); }

inline Vec16 load16(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) simt::fault("load16: %p is not aligned to 16 bytes", p);
  Vec16 v;
  memcpy(&v, p, 16);
  return v;
}
inline Vec16 load16_once(const void* p) { return load16(p); }
inline void store16(void* p, Vec16 v) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) simt::fault("store16: %p is not aligned to 16 bytes", p);
  memcpy(p, &v, 16);
  if (simt::self().block->hopper) simt::note_store16(p);
}

inline void copy_async16(void* to, const void* from, bool valid) { simt::copy_async16(to, from, valid); }
inline void commit() { simt::commit(); }
template <int N>
inline void wait() {
  simt::wait(N);
}

// ---- Matrix fragments: the layout of PTX's ldmatrix and mma.m16n8k16 ------------------------------------------------------------------

}  // namespace gx

#include "gpu/gx/fragments.h"

namespace gx {

void load_matrices(uint32_t (&r)[4], const void* p, const simt::Site& site);
void load_matrices_transposed(uint32_t (&r)[4], const void* p, const simt::Site& site);

inline void load_a(FragA& a, const void* p, simt::Site site = simt::Site::current()) { load_matrices(a.r, p, site); }
inline void load_a_transposed(FragA& a, const void* p, simt::Site site = simt::Site::current()) { load_matrices_transposed(a.r, p, site); }
inline void load_b_pair(FragB (&b)[2], const void* p, simt::Site site = simt::Site::current()) {
  uint32_t r[4];
  load_matrices(r, p, site);
  b[0] = {{r[0], r[1]}};
  b[1] = {{r[2], r[3]}};
}
inline void load_b_pair_transposed(FragB (&b)[2], const void* p, simt::Site site = simt::Site::current()) {
  uint32_t r[4];
  load_matrices_transposed(r, p, site);
  b[0] = {{r[0], r[1]}};
  b[1] = {{r[2], r[3]}};
}

// One FMA for each k, upwards from c.
void mma(FragC& c, const FragA& a, const FragB& b, simt::Site site = simt::Site::current());

// ---- Host -----------------------------------------------------------------------------------------------------------------------------

struct Properties {
  int multiprocessors, architecture, shared_bytes;
};
const Properties& properties(int index);
int device_count();
std::string device_name(int index);

template <class... Params, class... Args>
inline void launch(const char* name, void (*kernel)(Params...), dim3 grid, int block, size_t shared, const glmx::Device& /*device*/,
                   const Args&... args) {
  const auto body = [&] { kernel(args...); };
  simt::launch(name, [](const void* context) { (*static_cast<decltype(&body)>(context))(); }, &body, grid, block, shared);
}
inline void fill_zero(const char* /*name*/, void* p, size_t bytes, const glmx::Device& /*device*/) { memset(p, 0, bytes); }

}  // namespace gx
