// The scheduler of the CPU that plays GPU: fibers, collectives, barriers, late copies, faults.
//
// A block runs to its end on one OS thread. The scheduler resumes the fibers of one warp after another; a fiber runs until it must wait (a
// collective, a barrier, a poll) or ends. The lane that comes last to a collective performs it for all. When no fiber can run and no bulk
// copy is in flight, nothing will ever happen: that is a deadlock, and the report says who waits where. A faulty block is given up where it
// stands: its fibers are never resumed.
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <new>
#include <thread>

#include "core/parallel.h"
#include "gpu/gx/simt_engine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the registers that a called function must keep, swaps stacks, and restores. MXCSR is the same for all fibers: parallel_items set
// it.
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

constexpr size_t kGuardBytes = 256;  // behind dynamic shared memory: a store past the end is found when the block ends
constexpr uint64_t kCanary = 0x5afe57ac5afe57acu;
using Clock = std::chrono::steady_clock;
constexpr auto kPatience = std::chrono::seconds(20);  // with a block whose threads do nothing but poll
constexpr int64_t kBlockNs = 20'000;                  // about what a small block takes: whether two threads are worth waking

struct Options {
  std::atomic<Order> order{Order::forward};
  std::atomic<uint64_t> seed{1};
  std::atomic<int> architecture{90};
  // GLMX_BACKEND=simt[:sm80][:forward|:reverse|:random[:SEED]]
  Options() {
    const char* value = std::getenv("GLMX_BACKEND");
    const std::string text = value == nullptr ? "" : value;
    if (text.find(":reverse") != std::string::npos) order = Order::reverse;
    const size_t random = text.find(":random");
    if (random != std::string::npos) order = Order::random;
    if (random != std::string::npos && random + 8 < text.size()) seed = std::strtoull(text.c_str() + random + 8, nullptr, 10);
    if (text.find(":sm80") != std::string::npos) architecture = 80;
  }
};
Options& options() {
  static Options all;
  return all;
}

// Static shared memory: the thread-local storage of the library (or program) that holds the kernels and this file.
struct StaticShared {
  size_t module = 0, bytes = 0;
  unsigned char* here() const {
    size_t index[2] = {module, 0};
    return bytes == 0 ? nullptr : static_cast<unsigned char*>(__tls_get_addr(index));
  }
};
int find_static_shared(dl_phdr_info* info, size_t /*size*/, void* found) {
  const auto mine = reinterpret_cast<uintptr_t>(&gx_simt_switch);
  size_t bytes = 0;
  bool holds = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
    if (segment.p_type == PT_TLS) bytes = segment.p_memsz;
    if (segment.p_type == PT_LOAD && mine >= begin && mine < begin + segment.p_memsz) holds = true;
  }
  if (holds) *static_cast<StaticShared*>(found) = {info->dlpi_tls_modid, bytes};
  return holds ? 1 : 0;
}
const StaticShared& static_shared() {
  static const StaticShared known = [] {
    StaticShared found;
    dl_iterate_phdr(find_static_shared, &found);
    return found;
  }();
  return known;
}

// Thrown by fault(), so that what is on the faulty thread's stack is destroyed; the block's other threads are just never resumed.
struct GivenUp {};

// Where a fiber begins.
void enter() {
  Fiber& f = current();
  Worker& w = *f.worker;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &w.scheduler_stack, &w.scheduler_stack_bytes);
#endif
  try {
    w.launch->body(w.launch->context);
    w.end(f);
  } catch (const GivenUp&) {
  }
  w.yield(f);  // for good
  std::abort();
}

}  // namespace

// ---- Fibers ---------------------------------------------------------------------------------------------------------------------------

// All threads' stacks in one mapping; pages that are never touched cost nothing.
Worker::Worker() {
  const size_t bytes = kStackBytes * (kMaxThreads + 1);
  mapping = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  stacks = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(mapping) + kStackBytes - 1) & ~(kStackBytes - 1));
}
Worker::~Worker() { munmap(mapping, kStackBytes * (kMaxThreads + 1)); }

Async& Worker::issued(Fiber& f) {
  if (f.async == nullptr) {
    f.async = &asyncs[f.index.x];
    f.async->copies.clear();
    f.async->copy_groups.clear();
    f.async->products.clear();
    f.async->product_groups.clear();
    f.async->sums.clear();
    f.async->written.clear();
    f.async->fenced = false;
    f.async->fence_time = 0;
  }
  return *f.async;
}

void Worker::begin(int i) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stacks + static_cast<size_t>(i) * kStackBytes, kStackBytes);  // of fibers that were given up
#endif
  Fiber& f = fiber(i);
  new (&f) Fiber();
  f.index = dim3(static_cast<unsigned>(i), 0, 0);
  f.block = &block;
  f.worker = this;
  f.state = State::ready;
  canary(i) = kCanary;
  // The switch pops six registers and returns to `enter`, which must find its stack as after a call: 8 below a multiple of 16.
  void** top = reinterpret_cast<void**>(&f);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&enter);
  for (int r = 0; r < 6; ++r) *--top = nullptr;
  f.stack_pointer = top;
}

void Worker::resume(Fiber& f) {
#if defined(__SANITIZE_ADDRESS__)
  const uintptr_t header = reinterpret_cast<uintptr_t>(&f), bottom = header & ~(kStackBytes - 1);
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, reinterpret_cast<void*>(bottom), header - bottom);
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
  const int i = static_cast<int>(f.index.x);
  if (canary(i) != kCanary) fault("it overflowed its stack of %zu KiB", static_cast<size_t>(kStackBytes >> 10));
  if (f.async != nullptr && !f.async->products.empty()) fault("it ends with products of wgmma that it has not waited for");
  f.state = State::ended;
  --live;
  ++teams[i / kTeam].ended;
  ++warpgroups[i / kWarpgroup].ended;
  try_release(barriers[0], 0);
}

// ---- A block --------------------------------------------------------------------------------------------------------------------------

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
      if (sleeps > 0 && (warp * kWarp + lane) / kTeam == sleeper) continue;
      if (f.state == State::mbarrier && static_cast<int>(phase_of(f.mbarrier).parity) != f.parity) f.state = State::ready;
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

// Ends what is in flight: copies, else the products of a warpgroup that waits for them. False: there is nothing.
bool Worker::finish_something() {
  if (finish_in_flight()) return true;
  for (int i = 0; i < threads; ++i) {
    if (fiber(i).state != State::products) continue;
    fiber(i).state = State::ready;
    return true;
  }
  return false;
}

void Worker::run(int64_t item) {
  const dim3 grid = launch->grid;
  if (launch->order == Order::reverse) item = int64_t{grid.x} * grid.y - 1 - item;
  random = Random(launch->seed + static_cast<uint64_t>(item) * 7919);
  dynamic.resize(launch->shared + 1024 + kGuardBytes);
  memset(dynamic.data(), kPoison, dynamic.size());
  if (static_shared().bytes > 0) memset(static_shared().here(), kPoison, static_shared().bytes);
  block = {dim3(static_cast<unsigned>(item % grid.x), static_cast<unsigned>(item / grid.x), 0),
           dim3(static_cast<unsigned>(launch->threads)), grid,
           reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(dynamic.data()) + 1023) & ~uintptr_t{1023}), false};
  threads = live = launch->threads;
  sleeps = 0;
  failed = false;
  for (int i = 0; i < threads; i += kTeam) teams[i / kTeam].arrived = teams[i / kTeam].ended = 0;
  for (int i = 0; i < threads; i += kWarpgroup) warpgroups[i / kWarpgroup].arrived = warpgroups[i / kWarpgroup].ended = 0;
  for (Barrier& b : barriers) b.arrived = b.count = 0;
  mbarriers.clear();
  in_flight.clear();
  for (int i = 0; i < threads; ++i) begin(i);

  int warps[kMaxTeams];
  const int count = threads / kWarp;
  for (int i = 0; i < count; ++i) warps[i] = launch->order == Order::reverse ? count - 1 - i : i;
  Clock::time_point idle_since{};
  while (live > 0) {
    if (launch->order == Order::random) {
      random.shuffle(warps, count);
      // Lanes that take turns stay close together; a team that sleeps falls behind by many steps, as a warp may.
      if (sleeps > 0) {
        --sleeps;
      } else if (random.below(4) == 0) {
        sleeper = random.below(threads / kTeam);
        sleeps = 1 + random.below(16);
      }
      if (random.below(4) == 0) finish_something();  // earlier than it must
    }
    bool any = false;
    polled = true;
    for (int i = 0; i < count && !failed; ++i) any = run_warp(warps[i]) || any;
    if (failed) return;
    if (live == 0) break;
    if (sleeps > 0 && polled) {
      sleeps = 0;
      continue;
    }
    if (!polled) {
      idle_since = {};
    } else if (finish_something()) {
      if (failed) return;
      idle_since = {};
    } else if (!any) {
      return fail("deadlock: " + stuck());
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
  check_end_of_hopper();
  if (failed) return;
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (block.dynamic_shared[launch->shared + i] != kPoison) return fail("a store past the end of dynamic shared memory");
  }
}

std::string text_of(const Site& site) {
  const std::string file = site.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
}

// Who waits where: "32 threads (0..31) wait at barrier() in rms_norm.cu:40; 96 threads (32..127) have ended".
std::string Worker::stuck() {
  struct Place {
    int count = 0, first = 0, last = 0;
  };
  std::map<std::string, Place> places;
  for (int i = 0; i < threads; ++i) {
    const Fiber& f = fiber(i);
    std::string where = "have ended";
    if (f.state == State::paused || f.state == State::ready) where = "poll";
    if (f.state == State::group || f.state == State::products || f.state == State::barrier)
      where = std::string("wait at ") + f.what + " in " + text_of(f.site);
    if (f.state == State::barrier && f.barrier_id > 0) {
      where += ", id " + std::to_string(f.barrier_id) + " for " + std::to_string(barriers[f.barrier_id].threads);
    }
    if (f.state == State::mbarrier) where = describe(f);
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

void Worker::fail(const std::string& what) {
  failed = true;
  const std::lock_guard lock(launch->mutex);
  if (launch->failed.exchange(true)) return;
  launch->message =
      std::string(launch->name) + ": block (" + std::to_string(block.index.x) + ", " + std::to_string(block.index.y) + "): " + what;
}

void fault(const char* format, ...) {
  char text[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof(text), format, args);
  va_end(args);
  Fiber& f = current();
  f.worker->fail("thread " + std::to_string(f.index.x) + ": " + text);
  throw GivenUp();
}

// ---- Meeting --------------------------------------------------------------------------------------------------------------------------

namespace {
bool same(const Site& a, const Site& b) { return a.line() == b.line() && a.column() == b.column() && a.file_name() == b.file_name(); }
}  // namespace

void meet(Group& group, int first, int size, const char* what, const Site& site, void (*run)(void* const* lanes), void* mine, bool late) {
  Fiber& f = current();
  Worker& w = *f.worker;
  if (group.arrived > 0 && (group.run != run || !same(group.site, site))) {
    fault("divergence: it comes to %s in %s while %d of its %d wait at %s in %s", what, text_of(site).c_str(), group.arrived, size,
          group.what, text_of(group.site).c_str());
  }
  if (group.ended > 0)
    fault("divergence: it comes to %s in %s after %d of its %d have ended", what, text_of(site).c_str(), group.ended, size);
  group.what = what;
  group.site = site;
  group.run = run;
  group.lanes[static_cast<int>(f.index.x) - first] = mine;
  if (++group.arrived < size) {
    f.state = State::group;
    f.what = what;
    f.site = site;
    w.yield(f);
    return;
  }
  if (late) {
    f.state = State::products;
    f.what = what;
    f.site = site;
    w.yield(f);
  }
  group.arrived = 0;
  run(group.lanes);
  for (int i = first; i < first + size; ++i) w.fiber(i).state = State::ready;
}

void collective(const char* what, const Site& site, void (*run)(void* const* lanes), void* mine) {
  const int team = static_cast<int>(self().index.x) / kTeam;
  meet(current().worker->teams[team], team * kTeam, kTeam, what, site, run, mine, false);
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

int block_barrier(const char* what, const Site& site, int id, int threads, bool p) {
  Fiber& f = current();
  Worker& w = *f.worker;
  Barrier& b = w.barriers[id];
  if (threads > w.threads) fault("%s in %s: %d threads of a block of %d", what, text_of(site).c_str(), threads, w.threads);
  // Named barriers join producers and consumers, whose lines differ; the block's barrier is one line for all.
  if (b.arrived > 0 && (b.threads != threads || (id == 0 && !same(b.site, site)))) {
    fault("divergence: it comes to %s in %s (id %d, %d threads) while %d threads wait at %s in %s (%d threads)", what,
          text_of(site).c_str(), id, threads, b.arrived, b.what, text_of(b.site).c_str(), b.threads);
  }
  b.what = what;
  b.site = site;
  b.threads = threads;
  b.count += p;
  ++b.arrived;
  f.state = State::barrier;
  f.what = what;
  f.site = site;
  f.barrier_id = id;
  w.try_release(b, id);
  if (f.state != State::ready) w.yield(f);
  return b.last_count;
}

void pause() {
  Fiber& f = current();
  f.state = State::paused;
  f.worker->yield(f);
}

// ---- Memory ---------------------------------------------------------------------------------------------------------------------------

void check_shared(const char* what, const void* p, size_t bytes, size_t alignment) {
  const auto* at = static_cast<const unsigned char*>(p);
  const unsigned char* fixed = static_shared().here();
  const bool in_fixed = fixed != nullptr && at >= fixed && at + bytes <= fixed + static_shared().bytes;
  if (!in_fixed && !current().worker->in_dynamic(p, bytes)) fault("%s: %p is not shared memory of this block", what, p);
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) fault("%s: %p is not aligned to %zu bytes", what, p, alignment);
}

void copy_async16(void* to, const void* from, bool valid) {
  check_shared("copy_async16", to, 16, 16);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fault("copy_async16: the source %p is not aligned to 16 bytes", from);
  memset(to, kPoison, 16);
  Fiber& f = current();
  f.worker->issued(f).copies.push_back({to, valid ? from : nullptr});
}
void commit() {
  Fiber& f = current();
  Async& async = f.worker->issued(f);
  size_t grouped = 0;
  for (const size_t n : async.copy_groups) grouped += n;
  async.copy_groups.push_back(async.copies.size() - grouped);
}
void Worker::land(Fiber& f, const Copy* copies, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (copies[i].from == nullptr) {
      memset(copies[i].to, 0, 16);
    } else {
      memcpy(copies[i].to, copies[i].from, 16);
    }
    if (block.hopper) written(f, copies[i].to);
  }
}
void wait(int groups) {
  Fiber& f = current();
  Async& async = f.worker->issued(f);
  for (size_t i = 0; i < f.worker->in_flight.size();) {  // copies that also arrive at an mbarrier are among those that are waited for
    if (f.worker->in_flight[i].thread == &f) {
      f.worker->finish(i);
    } else {
      ++i;
    }
  }
  if (async.copy_groups.size() <= static_cast<size_t>(groups)) return;
  const auto waited = async.copy_groups.end() - groups;
  size_t count = 0;
  for (auto group = async.copy_groups.begin(); group != waited; ++group) count += *group;
  f.worker->land(f, async.copies.data(), count);
  async.copies.erase(async.copies.begin(), async.copies.begin() + static_cast<std::ptrdiff_t>(count));
  async.copy_groups.erase(async.copy_groups.begin(), waited);
}
void note_store16(const void* p) {
  Fiber& f = current();
  f.worker->written(f, p);
}

// ---- Launch ---------------------------------------------------------------------------------------------------------------------------

namespace {
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
      blocks, blocks * kBlockNs,
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

// ---- The device -----------------------------------------------------------------------------------------------------------------------

// Built for AVX2 and FMA (cmake/GlmxSimt.cmake), so without them there is no device.
int device_count() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0; }
std::string device_name(int) { return "CPU playing sm_" + std::to_string(properties(0).architecture); }
// Few multiprocessors, so that persistent kernels take several turns on small shapes.
const Properties& properties(int) {
  static const Properties ampere{2, 80, 163 << 10}, hopper{2, 90, 227 << 10};
  return simt::options().architecture == 80 ? ampere : hopper;
}

}  // namespace gx
