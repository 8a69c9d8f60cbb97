// The scheduler of the CPU that plays GPU, and what is too long for simt.h: fibers, collectives, barriers, late copies, faults, fragments.
//
// A block runs to its end on one OS thread. The scheduler resumes the fibers of one warp after another; a fiber runs until it must wait (a
// collective, a barrier, a poll) or ends. The lane that comes last to a collective performs it for all. When no fiber can run, nothing ever
// will: that is a deadlock, and the report says who waits where.
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "core/parallel.h"
#include "gpu/gx/gx.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the registers that a called function must keep, swaps stacks, and restores. MXCSR is the same for all fibers.
extern "C" __attribute__((visibility("hidden"))) void gx_simt_switch(void** save, void* to);
asm(R"(
.text
.globl gx_simt_switch
.hidden gx_simt_switch
.type gx_simt_switch, @function
gx_simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size gx_simt_switch, . - gx_simt_switch
)");
extern "C" void* __tls_get_addr(void*);

namespace gx {
namespace simt {
namespace {

constexpr int kMaxThreads = 1024, kMaxTeams = kMaxThreads / kTeam, kBarriers = 16;
constexpr size_t kGuardBytes = 256;  // behind dynamic shared memory: a store past the end is found when the block ends
constexpr int kPoison = 0xff;        // NaN as fp32 and as bf16, -1 as an integer
constexpr uint64_t kCanary = 0x5afe57ac5afe57acu;
using Clock = std::chrono::steady_clock;
constexpr auto kPatience = std::chrono::seconds(20);  // of a block whose threads do nothing but poll

struct Options {
  std::atomic<Order> order{Order::forward};
  std::atomic<uint64_t> seed{1};
  std::atomic<int> architecture{90};
};

// GLMX_BACKEND=simt[:sm80|:sm90][:forward|:reverse|:random]
Options& options() {
  static Options all;
  static const bool read = [] {
    const char* value = std::getenv("GLMX_BACKEND");
    const std::string text = value == nullptr ? "" : value;
    if (text.find(":reverse") != std::string::npos) all.order = Order::reverse;
    if (text.find(":random") != std::string::npos) all.order = Order::random;
    if (text.find(":sm80") != std::string::npos) all.architecture = 80;
    return true;
  }();
  (void)read;
  return all;
}

// xorshift64*: random enough to shuffle with, and the same on every machine.
struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15u | 1) {}
  uint64_t next() {
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return state * 0x2545f4914f6cdd1du >> 32;
  }
  template <class T>
  void shuffle(T* items, int count) {
    for (int i = count - 1; i > 0; --i) std::swap(items[i], items[next() % static_cast<uint64_t>(i + 1)]);
  }
};

enum class State : uint8_t { ready, collective, barrier, paused, ended };

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

struct Worker;
struct Fiber : Thread {
  Worker* worker;
  void* stack_pointer;
  void* fake_stack;  // ASan's
  State state;
  const char* where;  // what it waits at
  int barrier_id;
  std::vector<Copy> copies;    // issued and not yet delivered, oldest first
  std::vector<size_t> groups;  // how many of them each committed group has; what is left over is not committed
};
static_assert(sizeof(Fiber) <= kHeaderBytes);

struct Team {
  void* lanes[kTeam];
  const char* what;
  void (*run)(void* const* lanes);
  int arrived, ended;
};
struct Barrier {
  const char* what;
  int arrived, threads, count, last_count;
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

// Static shared memory: the thread-local storage of the library (or program) that holds the kernels and this file.
struct StaticShared {
  size_t module = 0, bytes = 0;
  unsigned char* here() const {
    size_t index[2] = {module, 0};
    return bytes == 0 ? nullptr : static_cast<unsigned char*>(__tls_get_addr(index));
  }
};
const StaticShared& static_shared() {
  static const StaticShared known = [] {
    StaticShared found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
          const auto mine = reinterpret_cast<uintptr_t>(&gx_simt_switch);
          size_t tls = 0;
          bool holds = false;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& segment = info->dlpi_phdr[i];
            const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
            if (segment.p_type == PT_TLS) tls = segment.p_memsz;
            if (segment.p_type == PT_LOAD && mine >= begin && mine < begin + segment.p_memsz) holds = true;
          }
          if (holds) *static_cast<StaticShared*>(out) = {info->dlpi_tls_modid, tls};
          return holds ? 1 : 0;
        },
        &found);
    return found;
  }();
  return known;
}

// What one OS thread needs to run a block; kept for the next block.
struct Worker {
  Block block;
  Launch* launch = nullptr;
  Fiber* current = nullptr;
  bool failed = false;  // of this block
  bool polled = false;  // every thread that ran in this round did nothing but poll
  int threads = 0, live = 0;
  void* scheduler = nullptr;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  std::vector<unsigned char> dynamic;
  Team teams[kMaxTeams];
  Barrier barriers[kBarriers];
  Random random{1};
  unsigned char* stacks = nullptr;
  void* mapping = nullptr;

  Worker();
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  Fiber& fiber(int i) { return *reinterpret_cast<Fiber*>(stacks + static_cast<size_t>(i + 1) * kStackBytes - kHeaderBytes); }
  uint64_t& canary(int i) { return *reinterpret_cast<uint64_t*>(stacks + static_cast<size_t>(i) * kStackBytes); }
  Fiber& begin(int i);
  void run(int64_t item);
  bool run_warp(int warp);
  void resume(Fiber& f);
  void yield(Fiber& f);
  void end(Fiber& f);
  void try_release(Barrier& b, int id);
  void deliver(Fiber& f, size_t count);
  void fail(const std::string& what);
  std::string stuck();
};

// All threads' stacks in one mapping; pages that are never touched cost nothing.
Worker::Worker() {
  const size_t bytes = kStackBytes * (kMaxThreads + 1);
  mapping = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  stacks = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(mapping) + kStackBytes - 1) & ~(kStackBytes - 1));
}
Worker::~Worker() {
  for (int i = 0; i < kMaxThreads; ++i) {
    if (fiber(i).worker != nullptr) fiber(i).~Fiber();
  }
  munmap(mapping, kStackBytes * (kMaxThreads + 1));
}

Fiber& current() { return static_cast<Fiber&>(self()); }

void enter() {
  Fiber& f = current();
  Worker& w = *f.worker;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &w.scheduler_stack, &w.scheduler_stack_bytes);
#endif
  w.launch->body(w.launch->context);
  w.end(f);
  w.yield(f);  // for good
  std::abort();
}

Fiber& Worker::begin(int i) {
  Fiber& f = fiber(i);
  if (f.worker == nullptr) new (&f) Fiber();
  f.index = dim3(static_cast<unsigned>(i), 0, 0);
  f.block = &block;
  f.worker = this;
  f.fake_stack = nullptr;
  f.state = State::ready;
  f.where = "";
  f.copies.clear();
  f.groups.clear();
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stacks + static_cast<size_t>(i) * kStackBytes, kStackBytes - kHeaderBytes);
#endif
  canary(i) = kCanary;
  // The switch pops six registers and returns to `enter`, which must find its stack as after a call: 8 below a multiple of 16.
  void** top = reinterpret_cast<void**>(&f);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&enter);
  for (int r = 0; r < 6; ++r) *--top = nullptr;
  f.stack_pointer = top;
  return f;
}

void Worker::resume(Fiber& f) {
  current = &f;
#if defined(__SANITIZE_ADDRESS__)
  const auto* stack = reinterpret_cast<unsigned char*>(&f) + kHeaderBytes - kStackBytes;
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, stack, kStackBytes - kHeaderBytes);
#endif
  gx_simt_switch(&scheduler, f.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}
void Worker::yield(Fiber& f) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(f.state == State::ended ? nullptr : &f.fake_stack, scheduler_stack, scheduler_stack_bytes);
#endif
  gx_simt_switch(&f.stack_pointer, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);
#endif
}

void Worker::end(Fiber& f) {
  f.state = State::ended;
  --live;
  const int i = static_cast<int>(f.index.x);
  if (canary(i) != kCanary) fail("a thread overflowed its stack of " + std::to_string(kStackBytes >> 10) + " KiB");
  ++teams[i / kTeam].ended;
  try_release(barriers[0], 0);
}

void Worker::fail(const std::string& what) {
  failed = true;
  const std::lock_guard lock(launch->mutex);
  if (launch->failed.exchange(true)) return;
  launch->message =
      std::string(launch->name) + ": block (" + std::to_string(block.index.x) + ", " + std::to_string(block.index.y) + "): " + what;
}

void Worker::try_release(Barrier& b, int id) {
  const int needed = id == 0 ? live : b.threads;
  if (b.arrived == 0 || b.arrived < needed) return;
  b.last_count = b.count;
  b.arrived = b.count = 0;
  for (int i = 0; i < threads; ++i) {
    Fiber& f = fiber(i);
    if (f.state == State::barrier && f.barrier_id == id) f.state = State::ready;
  }
}

void Worker::deliver(Fiber& f, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const Copy& copy = f.copies[i];
    if (copy.from == nullptr) {
      memset(copy.to, 0, 16);
    } else {
      memcpy(copy.to, copy.from, 16);
    }
  }
  f.copies.erase(f.copies.begin(), f.copies.begin() + static_cast<std::ptrdiff_t>(count));
}

// Who waits where: "32 threads (0..31) at barrier(); 96 have ended".
std::string Worker::stuck() {
  struct Place {
    int count = 0, first = 0, last = 0;
  };
  std::map<std::string, Place> places;
  for (int i = 0; i < threads; ++i) {
    const Fiber& f = fiber(i);
    std::string where = f.state == State::ended ? "have ended" : std::string("wait at ") + f.where;
    if (f.state == State::barrier && f.barrier_id > 0) where += " " + std::to_string(f.barrier_id);
    Place& place = places[where];
    if (place.count++ == 0) place.first = i;
    place.last = i;
  }
  std::string text;
  for (const auto& [where, place] : places) {
    text += (text.empty() ? "" : "; ") + std::to_string(place.count) + " threads (" + std::to_string(place.first) + ".." +
            std::to_string(place.last) + ") " + where;
  }
  return text;
}

// Runs the threads of one warp until all of them wait; in random order, once around. True if one ran.
bool Worker::run_warp(int warp) {
  int lanes[kWarp];
  for (int i = 0; i < kWarp; ++i) lanes[i] = launch->order == Order::reverse ? kWarp - 1 - i : i;
  bool any = false;
  for (bool ran = true; ran;) {
    ran = false;
    if (launch->order == Order::random) random.shuffle(lanes, kWarp);
    for (const int lane : lanes) {
      Fiber& f = fiber(warp * kWarp + lane);
      if (f.state != State::ready) continue;
      resume(f);
      if (failed) return true;
      ran = any = true;
      polled = polled && f.state == State::paused;
    }
    if (launch->order == Order::random) break;
  }
  return any;
}

void Worker::run(int64_t item) {
  const dim3 grid = launch->grid;
  const int64_t blocks = int64_t{grid.x} * grid.y;
  if (launch->order == Order::reverse) item = blocks - 1 - item;
  block = {dim3(static_cast<unsigned>(item % grid.x), static_cast<unsigned>(item / grid.x), 0),
           dim3(static_cast<unsigned>(launch->threads)), grid, nullptr};
  random = Random(launch->seed + static_cast<uint64_t>(item) * 7919);
  dynamic.resize(launch->shared + 1024 + kGuardBytes);
  memset(dynamic.data(), kPoison, dynamic.size());
  block.dynamic_shared = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(dynamic.data()) + 1023) & ~uintptr_t{1023});
  if (static_shared().bytes > 0) memset(static_shared().here(), kPoison, static_shared().bytes);
  threads = live = launch->threads;
  failed = false;
  memset(teams, 0, sizeof(teams));
  memset(barriers, 0, sizeof(barriers));
  for (int i = 0; i < threads; ++i) begin(i);

  int warps[kMaxThreads / kTeam];
  const int count = threads / kWarp;
  for (int i = 0; i < count; ++i) warps[i] = launch->order == Order::reverse ? count - 1 - i : i;
  Clock::time_point idle_since{};
  while (live > 0) {
    if (launch->order == Order::random) random.shuffle(warps, count);
    bool any = false;
    polled = true;
    for (int i = 0; i < count; ++i) {
      any = run_warp(warps[i]) || any;
      if (failed) return;
    }
    if (!any && live > 0) return fail("deadlock: " + stuck());
    if (!polled) {
      idle_since = {};
    } else if (idle_since == Clock::time_point{}) {
      idle_since = Clock::now();
    } else if (Clock::now() - idle_since > kPatience) {
      return fail("its threads poll for what no other block writes: " + stuck());
    } else {
      std::this_thread::yield();
    }
    for (int i = 0; i < threads; ++i) {
      if (fiber(i).state == State::paused) fiber(i).state = State::ready;
    }
  }
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (block.dynamic_shared[launch->shared + i] != kPoison) return fail("a store past the end of dynamic shared memory");
  }
}

// Workers that no OS thread uses now.
struct Pool {
  std::mutex mutex;
  std::vector<std::unique_ptr<Worker>> idle;
  std::unique_ptr<Worker> take() {
    const std::lock_guard lock(mutex);
    if (idle.empty()) return std::make_unique<Worker>();
    auto worker = std::move(idle.back());
    idle.pop_back();
    return worker;
  }
  void give(std::unique_ptr<Worker> worker) {
    const std::lock_guard lock(mutex);
    idle.push_back(std::move(worker));
  }
};
Pool& pool() {
  static Pool all;
  return all;
}

}  // namespace

void set_order(Order order, uint64_t seed) {
  options().order = order;
  options().seed = seed;
}
void set_architecture(int architecture) { options().architecture = architecture; }

void fault(const char* format, ...) {
  char text[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof(text), format, args);
  va_end(args);
  Fiber& f = current();
  f.worker->fail("thread " + std::to_string(f.index.x) + ": " + text);
  f.worker->yield(f);  // for good: the block is given up
  std::abort();
}

void collective(const char* what, void (*run)(void* const* lanes), void* mine) {
  Fiber& f = current();
  const int lane = static_cast<int>(f.index.x) % kTeam;
  Team& team = f.worker->teams[f.index.x / kTeam];
  if (team.arrived > 0 && team.run != run) {
    fault("divergence: it comes to %s while %d lanes of its team wait at %s", what, team.arrived, team.what);
  }
  if (team.ended > 0) fault("divergence: it comes to %s after %d lanes of its team have ended", what, team.ended);
  team.what = what;
  team.run = run;
  team.lanes[lane] = mine;
  if (++team.arrived < kTeam) {
    f.state = State::collective;
    f.where = what;
    f.worker->yield(f);
    return;
  }
  team.arrived = 0;
  run(team.lanes);
  for (int i = 0; i < kTeam; ++i) f.worker->fiber(static_cast<int>(f.index.x) - lane + i).state = State::ready;
}

int block_barrier(const char* what, int id, int threads, bool p) {
  Fiber& f = current();
  Worker& w = *f.worker;
  Barrier& b = w.barriers[id];
  if (threads > w.threads) fault("%s: %d threads of a block of %d", what, threads, w.threads);
  if (b.arrived > 0 && (b.threads != threads || b.what != what)) {
    fault("divergence: it comes to %s %d for %d threads while %d threads wait at %s for %d", what, id, threads, b.arrived, b.what,
          b.threads);
  }
  b.what = what;
  b.threads = threads;
  b.count += p;
  ++b.arrived;
  f.state = State::barrier;
  f.where = what;
  f.barrier_id = id;
  w.try_release(b, id);
  if (f.state != State::ready) w.yield(f);
  return b.last_count;
}

void pause() {
  Fiber& f = current();
  f.state = State::paused;
  f.where = "observe()";
  f.worker->yield(f);
}

void check_shared(const char* what, const void* p, size_t bytes, size_t alignment) {
  Worker& w = *current().worker;
  const auto* at = static_cast<const unsigned char*>(p);
  const unsigned char* fixed = static_shared().here();
  const bool in_dynamic = at >= w.block.dynamic_shared && at + bytes <= w.block.dynamic_shared + w.launch->shared;
  const bool in_fixed = fixed != nullptr && at >= fixed && at + bytes <= fixed + static_shared().bytes;
  if (!in_dynamic && !in_fixed) fault("%s: %p is not shared memory of this block", what, p);
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) fault("%s: %p is not aligned to %zu bytes", what, p, alignment);
}

void copy_async16(void* to, const void* from, bool valid) {
  check_shared("copy_async16", to, 16, 16);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fault("copy_async16: the source %p is not aligned to 16 bytes", from);
  memset(to, kPoison, 16);
  current().copies.push_back({to, valid ? from : nullptr});
}
void commit() {
  Fiber& f = current();
  size_t grouped = 0;
  for (const size_t n : f.groups) grouped += n;
  f.groups.push_back(f.copies.size() - grouped);
}
void wait(int groups) {
  Fiber& f = current();
  while (f.groups.size() > static_cast<size_t>(groups)) {
    f.worker->deliver(f, f.groups.front());
    f.groups.erase(f.groups.begin());
  }
}

void launch(const char* name, void (*body)(const void*), const void* context, dim3 grid, int block, size_t shared) {
  if (grid.x == 0 || grid.y == 0) return;
  GLMX_CHECK(block > 0 && block <= kMaxThreads && block % kBlockStep == 0, name,
             ": expected a block of 64..1024 threads, a multiple of 64: got ", block);
  GLMX_CHECK(grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z == 1, name, ": expected a grid within 2^31 - 1, 65535, 1: got ", grid.x,
             ", ", grid.y, ", ", grid.z);
  GLMX_CHECK(shared <= static_cast<size_t>(properties(0).shared_bytes), name, ": expected at most ", properties(0).shared_bytes,
             " bytes of shared memory: got ", shared);
  Launch all{name, body, context, grid, block, shared, options().order, options().seed, {}, {}, {}};
  const int64_t blocks = int64_t{grid.x} * grid.y;
  glmx::parallel_items(
      blocks, blocks * 20'000,
      [](void* launch, int64_t item) {
        Launch& all = *static_cast<Launch*>(launch);
        if (all.failed) return;
        std::unique_ptr<Worker> worker = pool().take();
        worker->launch = &all;
        worker->run(item);
        pool().give(std::move(worker));
      },
      &all);
  GLMX_CHECK(!all.failed, all.message);
}

}  // namespace simt

// ---- Fragments
// ----------------------------------------------------------------------------------------------------------------------------

namespace {
struct MatrixLane {
  const void* row;
  uint32_t* out;
};
// Lane 8 j + i brings row i of the 8 x 8 matrix j; every lane takes two neighbouring elements of a row (or of a column) of each matrix.
template <bool kTransposed>
void move_matrices(void* const* lanes) {
  uint16_t m[4][8][8];
  for (int i = 0; i < kTeam; ++i) memcpy(m[i / 8][i % 8], static_cast<MatrixLane*>(lanes[i])->row, 16);
  for (int i = 0; i < kTeam; ++i) {
    const int row = i / 4, col = i % 4 * 2;
    for (int j = 0; j < 4; ++j) {
      const uint32_t first = kTransposed ? m[j][col][row] : m[j][row][col];
      const uint32_t second = kTransposed ? m[j][col + 1][row] : m[j][row][col + 1];
      static_cast<MatrixLane*>(lanes[i])->out[j] = first | second << 16;
    }
  }
}
struct MmaLane {
  float* c;
  const uint32_t *a, *b;
};
float widen(uint32_t half) {
  const uint32_t bits = half << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
void multiply(void* const* lanes) {
  float a[16][16], b[16][8], c[16][8];  // a [m][k], b [k][n]
  for (int i = 0; i < kTeam; ++i) {
    const MmaLane& lane = *static_cast<const MmaLane*>(lanes[i]);
    const int row = i / 4, col = i % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      const int shift = half * 16;
      for (int r = 0; r < 4; ++r) a[row + r % 2 * 8][col + r / 2 * 8 + half] = widen(lane.a[r] >> shift & 0xffff);
      for (int r = 0; r < 2; ++r) b[col + r * 8 + half][row] = widen(lane.b[r] >> shift & 0xffff);
      for (int r = 0; r < 2; ++r) c[row + r * 8][col + half] = lane.c[r * 2 + half];
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) c[m][n] = std::fma(a[m][k], b[k][n], c[m][n]);
    }
  }
  for (int i = 0; i < kTeam; ++i) {
    for (int r = 0; r < 4; ++r) static_cast<const MmaLane*>(lanes[i])->c[r] = c[i / 4 + r / 2 * 8][i % 4 * 2 + r % 2];
  }
}
}  // namespace

void load_matrices(uint32_t (&r)[4], const void* p) {
  simt::check_shared("ldmatrix", p, 16, 16);
  MatrixLane mine{p, r};
  simt::collective("ldmatrix", move_matrices<false>, &mine);
}
void load_matrices_transposed(uint32_t (&r)[4], const void* p) {
  simt::check_shared("ldmatrix.trans", p, 16, 16);
  MatrixLane mine{p, r};
  simt::collective("ldmatrix.trans", move_matrices<true>, &mine);
}
void mma(FragC& c, const FragA& a, const FragB& b) {
  MmaLane mine{c.v, a.r, b.r};
  simt::collective("mma", multiply, &mine);
}

// ---- The device
// ---------------------------------------------------------------------------------------------------------------------------

// Built for AVX2 and FMA (cmake/GlmxSimt.cmake), so without them there is no device.
int device_count() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0; }
std::string device_name(int) { return std::string("a CPU that plays an sm_") + std::to_string(properties(0).architecture) + " GPU"; }
// Few multiprocessors, so that persistent kernels take several turns on small shapes.
const Properties& properties(int) {
  static const Properties ampere{4, 80, 163 << 10}, hopper{4, 90, 227 << 10};
  return simt::options().architecture == 80 ? ampere : hopper;
}

}  // namespace gx
