// parallel_items: a counter shared by the pool's workers, the rounding environment of every worker, and what is too little to share.
#include "core/parallel.h"

#include <emmintrin.h>

#include <algorithm>
#include <atomic>

namespace glmx {
namespace {

ThreadPool g_pool{nullptr, nullptr};
std::atomic<int64_t> g_small_work_ns{kSmallWorkNs};

// FTZ | DAZ: the AMX unit flushes denormals, so every ISA does.
class FlushDenormals {
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(saved_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned saved_;
};

struct Job {
  void (*body)(void*, int64_t);
  void* context;
  int64_t items;
  std::atomic<int64_t> next{0};
};

void work(void* job_pointer, int64_t /*worker*/) {
  Job& job = *static_cast<Job*>(job_pointer);
  const FlushDenormals flush;
  for (int64_t i = job.next.fetch_add(1, std::memory_order_relaxed); i < job.items; i = job.next.fetch_add(1, std::memory_order_relaxed)) {
    job.body(job.context, i);
  }
}

}  // namespace

void install_thread_pool(const ThreadPool& pool) { g_pool = pool; }

int64_t parallel_threads() { return g_pool.threads == nullptr ? 1 : std::max<int64_t>(1, g_pool.threads()); }

int64_t set_small_work(int64_t nanoseconds) { return g_small_work_ns.exchange(nanoseconds); }

void parallel_items(int64_t items, int64_t work_ns, void (*body)(void*, int64_t), void* context) {
  if (items <= 0) return;
  Job job{body, context, items};
  const bool small = work_ns < g_small_work_ns.load(std::memory_order_relaxed);
  const int64_t workers = small ? 1 : std::min(items, parallel_threads());
  if (workers == 1) {
    work(&job, 0);
  } else {
    g_pool.run(workers, work, &job);
  }
}

}  // namespace glmx
