// Work items on a pool of threads. The pool is torch's, installed by csrc/torch through a function pointer; without one, work is serial.
#pragma once
#include <cstdint>

namespace glmx {

// Runs body(context, item) once for each item in [0, items), items taken from a counter by the pool's threads, so that a slow item
// holds up nobody. Denormals are flushed (FTZ + DAZ) in every worker. Which thread runs an item must not matter to its result.
// A plain function pointer, not a template: ISA folders may call it without emitting shared inline code.
void parallel_items(int64_t items, void (*body)(void* context, int64_t item), void* context);

// How many threads may run items at once.
int64_t parallel_threads();

// The pool: run(workers, task, context) calls task(context, worker) for each worker in [0, workers), perhaps concurrently.
struct ThreadPool {
  int64_t (*threads)();
  void (*run)(int64_t workers, void (*task)(void* context, int64_t worker), void* context);
};
void install_thread_pool(const ThreadPool& pool);

}  // namespace glmx
