// parallel_items runs each item once with denormals flushed, and only large work on the pool; scratch buffers are aligned, grow, and are
// apart.
#include <xmmintrin.h>

#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "core/parallel.h"
#include "core/workspace.h"
#include "cpu/kernels.h"
#include "harness.h"

namespace {

TEST(parallel, each_item_once_with_denormals_flushed) {
  std::vector<int> seen(100, 0);
  const unsigned before = _mm_getcsr();
  glmx::parallel_items(
      100, 0, [](void* context, int64_t item) { static_cast<int*>(context)[item] += (_mm_getcsr() & 0x8040u) == 0x8040u ? 1 : 100; },
      seen.data());
  for (int n : seen) CHECK(n == 1, n);
  CHECK(_mm_getcsr() == before);
}

// A pool of two threads that counts how often it is asked.
class CountingPool {
 public:
  CountingPool() {
    asked = 0;
    glmx::install_thread_pool({[] { return int64_t{2}; },
                               [](int64_t workers, void (*task)(void*, int64_t), void* context) {
                                 ++asked;
                                 CHECK(workers == 2, workers);
                                 std::thread other(task, context, 1);
                                 task(context, 0);
                                 other.join();
                               }});
  }
  ~CountingPool() { glmx::install_thread_pool({nullptr, nullptr}); }
  static inline int asked;
};

struct Items {
  std::thread::id caller = std::this_thread::get_id();
  std::atomic<int> seen{0}, elsewhere{0};
  static void count(void* context, int64_t) {
    Items& items = *static_cast<Items*>(context);
    ++items.seen;
    if (std::this_thread::get_id() != items.caller) ++items.elsewhere;
  }
};

TEST(parallel, small_work_stays_on_the_calling_thread) {
  const CountingPool pool;
  Items items;
  glmx::parallel_items(100, glmx::kSmallWorkNs - 1, Items::count, &items);
  CHECK(items.seen == 100 && items.elsewhere == 0 && pool.asked == 0, items.seen, " ", items.elsewhere, " ", pool.asked);
  glmx::parallel_items(100, glmx::kSmallWorkNs, Items::count, &items);
  CHECK(items.seen == 200 && pool.asked == 1, items.seen, " ", pool.asked);
  glmx::parallel_items(1, glmx::kSmallWorkNs, Items::count, &items);
  CHECK(items.seen == 201 && pool.asked == 1, "one item has nobody to be shared with");
  const int64_t before = glmx::set_small_work(0);
  CHECK(before == glmx::kSmallWorkNs, before);
  glmx::parallel_items(100, 0, Items::count, &items);
  glmx::set_small_work(before);
  CHECK(items.seen == 301 && pool.asked == 2, items.seen, " ", pool.asked);
}

// Through an op: one token of the demo's attention is small, its head and a prompt are not.
TEST(parallel, a_gemm_knows_its_work) {
  const CountingPool pool;
  const auto asked_for = [&pool](int32_t rows, int64_t N, int64_t K) {
    const std::vector<uint16_t> x(rows * K), w(N * K);
    std::vector<uint16_t> out(rows * N);
    const int32_t offsets[2] = {0, rows};
    glmx::GroupedGemmParams p{};
    p.x = x.data(), p.w = w.data(), p.expert_offsets = offsets, p.out = out.data();
    p.M = p.R = rows, p.N = N, p.K = K, p.E = 1, p.dtype = p.out_dtype = glmx::DType::bf16;
    const int before = pool.asked;
    glmx::cpu::base::grouped_gemm(p);
    return pool.asked - before;
  };
  CHECK(asked_for(1, 256, 256) == 0);
  CHECK(asked_for(1, 4096, 256) == 1);
  CHECK(asked_for(64, 256, 256) == 1);
}

TEST(parallel, scratch) {
  char* item = static_cast<char*>(glmx::thread_scratch(glmx::Scratch::item, 100));
  char* shared = static_cast<char*>(glmx::thread_scratch(glmx::Scratch::shared, 100));
  CHECK(item + 100 <= shared || shared + 100 <= item);
  CHECK(glmx::thread_scratch(glmx::Scratch::item, 50) == item, "a smaller request gets the same buffer");
  char* large = static_cast<char*>(glmx::thread_scratch(glmx::Scratch::item, 1 << 20));
  CHECK(reinterpret_cast<uintptr_t>(large) % 64 == 0);
  std::memset(large, 1, 1 << 20);
}

}  // namespace
