// The inside of the CPU that plays GPU, shared by simt.cpp (scheduler) and hopper_simt.cpp (bulk copies, mbarriers, products). Kernels see
// simt.h and hopper_simt.h alone.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "gpu/gx/hopper.h"

namespace gx::simt {

inline constexpr int kMaxThreads = 1024, kMaxTeams = kMaxThreads / kTeam, kBarriers = 16;
inline constexpr int kWarpgroup = 128, kMaxWarpgroups = kMaxThreads / kWarpgroup;
inline constexpr int kPoison = 0xff;  // every byte of what nobody has written: NaN as fp32 and as bf16, -1 as an integer

// xorshift64*: random enough to shuffle with, and the same on every machine.
struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15u | 1) {}
  uint64_t next() {
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return state * 0x2545f4914f6cdd1du >> 32;
  }
  int below(int limit) { return static_cast<int>(next() % static_cast<uint64_t>(limit)); }
  template <class T>
  void shuffle(T* items, int count) {
    for (int i = count - 1; i > 0; --i) std::swap(items[i], items[below(i + 1)]);
  }
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
};
struct Product {
  float* c;
  int n;
  uint64_t a, b;
  bool onto;
  uint64_t digest;  // of the operands when it was issued; of the first lane of each team alone
};
// Sums of products in flight: the kernel's own array holds poison until the last of them is waited for.
struct Sums {
  float* c;
  int count, in_flight;
  float values[128];
};
// What a thread has issued and not waited for, oldest first. A group is how many belong to it; what is left over is not committed.
struct Async {
  std::vector<Copy> copies;
  std::vector<size_t> copy_groups;
  std::vector<Product> products;
  std::vector<size_t> product_groups;
  std::vector<Sums> sums;
  bool fenced = false;            // wgmma_fence() since the last wgmma_wait()
  std::vector<uint32_t> written;  // units of 16 bytes that it wrote since its last fence_async()
  uint32_t fence_time = 0;        // Worker::time at that fence_async()
};

enum class State : uint8_t { ready, group, products, barrier, mbarrier, paused, ended };

struct Worker;
struct Fiber : Thread {
  Worker* worker;
  void* stack_pointer;
  void* fake_stack;  // ASan's
  Async* async;      // null until it issues something: see issued()
  const char* what;  // what it waits at, and where that is
  Site site;
  const uint64_t* mbarrier;
  int barrier_id, parity;
  State state;
};
static_assert(sizeof(Fiber) <= kHeaderBytes);

// Threads that meet: a team of 32 or a warpgroup of 128.
struct Group {
  const char* what;
  Site site;
  void (*run)(void* const* lanes);
  int arrived, ended;
  void* lanes[kWarpgroup];
};
struct Barrier {
  const char* what;
  Site site;
  int arrived, threads, count, last_count;
};

// An mbarrier in its 64 bits.
struct Phase {
  uint32_t arrivals : 16, pending : 16;
  int32_t bytes : 31;  // expected and not yet delivered
  uint32_t parity : 1;
};
static_assert(sizeof(Phase) == 8);
struct KnownMbarrier {
  const uint64_t* at;
  unsigned thread;  // that initialised it
  bool fenced;      // mbarrier_init_done() since
};
// An operation in flight that ends at an mbarrier: a bulk copy, or a thread's 16-byte copies that arrive when they have landed.
struct InFlight {
  uint64_t* mbarrier;
  unsigned char* to;  // of a bulk copy; else null
  TensorMap map;
  int column, row;
  Fiber* thread;  // whose copies
  std::vector<Copy> copies;
};
// Of 16 bytes of dynamic shared memory: when a thread wrote them, which one, and whether it has fenced them (time 0: nothing to fence).
struct Write {
  uint32_t time;
  uint32_t thread;
};

struct Launch {
  const char* name;
  void (*body)(const void*);
  const void* context;
  dim3 grid;
  int threads;
  size_t shared;
  Order order;
  uint64_t seed;
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::string message;
};

// What one OS thread needs to run a block; kept for the next one.
struct Worker {
  Block block{};
  Launch* launch = nullptr;
  bool failed = false;  // of this block
  bool polled = false;  // every thread that ran in this round did nothing but poll
  int threads = 0, live = 0;
  int sleeper = -1, sleeps = 0;  // in random order a team that is left behind, and for how many rounds
  void* scheduler = nullptr;     // its stack pointer; the rest is ASan's
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  std::vector<unsigned char> dynamic;
  Group teams[kMaxTeams], warpgroups[kMaxWarpgroups];
  Barrier barriers[kBarriers];
  std::vector<KnownMbarrier> mbarriers;
  std::vector<InFlight> in_flight;  // oldest first
  std::vector<Write> writes;
  uint32_t time = 0;  // counts writes that fence_async() must cover
  Random random{1};
  std::vector<Async> asyncs{kMaxThreads};
  struct Tile {
    float a[64][16], b[256][16], c[64][256];
  };
  std::unique_ptr<Tile> tile;  // of the product that is being computed
  void* mapping = nullptr;
  unsigned char* stacks = nullptr;

  Worker();
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  Fiber& fiber(int i) {
    return *reinterpret_cast<Fiber*>(header_of(reinterpret_cast<uintptr_t>(stacks) + static_cast<uintptr_t>(i) * kStackBytes));
  }
  Async& issued(Fiber& f);
  uint64_t& canary(int i) { return *reinterpret_cast<uint64_t*>(stacks + static_cast<size_t>(i) * kStackBytes); }
  void run(int64_t item);
  bool finish_something();
  void land(Fiber& f, const Copy* copies, size_t count);
  void begin(int i);
  bool run_warp(int warp);
  void resume(Fiber& f);
  void yield(Fiber& f);
  void end(Fiber& f);
  void try_release(Barrier& b, int id);
  std::string stuck();
  void fail(const std::string& what);  // from the scheduler; a thread calls fault()
  bool in_dynamic(const void* p, size_t bytes) const {
    const auto* at = static_cast<const unsigned char*>(p);
    return at >= block.dynamic_shared && at + bytes <= block.dynamic_shared + launch->shared;
  }

  // hopper_simt.cpp
  void begin_hopper();
  bool finish_in_flight();  // one or more; false: there is none
  void finish(size_t index);
  void check_end_of_hopper();
  void written(Fiber& f, const void* p);
  std::string describe(const Fiber& f);  // one that waits at an mbarrier
};

inline Fiber& current() { return static_cast<Fiber&>(self()); }
inline Phase phase_of(const uint64_t* mbarrier) {
  Phase phase;
  memcpy(&phase, mbarrier, 8);
  return phase;
}
// Threads [first, first + size) of the block meet; the last one calls run. late: not before no other thread of the block can run.
void meet(Group& group, int first, int size, const char* what, const Site& site, void (*run)(void* const* lanes), void* mine, bool late);
std::string text_of(const Site& site);  // "rms_norm.cu:40"

}  // namespace gx::simt
