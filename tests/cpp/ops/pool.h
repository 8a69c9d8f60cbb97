// A thread pool for the tests: threads of its own for each call, workers handed out one by one, as torch's pool does.
#pragma once
#include <thread>
#include <vector>

#include "core/parallel.h"

inline int64_t g_threads = 1;

inline void use_threads(int64_t n) {
  g_threads = n;
  glmx::set_small_work(0);  // the cases are small
  glmx::ThreadPool pool{};
  pool.threads = [] { return g_threads; };
  pool.run = [](int64_t workers, void (*task)(void*, int64_t), void* context) {
    std::vector<std::thread> threads;
    for (int64_t worker = 1; worker < workers; ++worker) threads.emplace_back(task, context, worker);
    task(context, 0);
    for (std::thread& thread : threads) thread.join();
  };
  glmx::install_thread_pool(pool);
}
