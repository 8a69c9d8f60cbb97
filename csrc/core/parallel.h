// Work items on a pool of threads. The pool is torch's, installed by csrc/torch through a function pointer; without one, work is serial.
#pragma once
#include <cstdint>

namespace glmx {

// Runs body(context, item) once for each item in [0, items), items taken from a counter by the pool's threads, so that a slow item
// holds up nobody. Denormals are flushed (FTZ + DAZ) in every worker. Which thread runs an item must not matter to its result.
// work_ns is about how long all items together take one core, in nanoseconds: a formula of the op's sizes, taken from the "Measured" line
// of its kernel (AVX2, weights and rows from the nearest cache that holds them). Less than the small work stays on the calling thread.
// The estimate decides who computes, never what: a factor of two does not matter, and no bits depend on it.
// A plain function pointer, not a template: ISA folders may call it without emitting shared inline code.
void parallel_items(int64_t items, int64_t work_ns, void (*body)(void* context, int64_t item), void* context);

// Less work than this is small. Two threads save half of the work and pay for a parallel region. Measured on two cores of a shared AMD EPYC
// (Zen 3, libgomp): a region costs 1.4 us behind another one and 4 us after a pause of 2 ms, so that on an idle machine sharing pays from
// 8 us of work on. When another process keeps one core busy, the caller waits until the scheduler lets its other thread in: 40 us on
// average behind another region, 2.7 ms after a pause. At 50 us, a decode step of a small model risks that once, for its head, instead of
// 33 times, and an idle machine loses at most 25 us - 4 us of waiting for an op.
inline constexpr int64_t kSmallWorkNs = 50'000;

// Replaces kSmallWorkNs and returns what was in force. For tests: with 0 even the smallest op is shared out, so that small shapes prove
// that results do not depend on threads.
int64_t set_small_work(int64_t nanoseconds);

// How many threads may run items at once.
int64_t parallel_threads();

// The pool: run(workers, task, context) calls task(context, worker) for each worker in [0, workers), perhaps concurrently.
struct ThreadPool {
  int64_t (*threads)();
  void (*run)(int64_t workers, void (*task)(void* context, int64_t worker), void* context);
};
void install_thread_pool(const ThreadPool& pool);

}  // namespace glmx
