// parallel_items runs each item once with denormals flushed; scratch buffers are aligned, grow, and are apart.
#include <xmmintrin.h>

#include <cstring>
#include <vector>

#include "core/parallel.h"
#include "core/workspace.h"
#include "harness.h"

namespace {

TEST(parallel, each_item_once_with_denormals_flushed) {
  std::vector<int> seen(100, 0);
  const unsigned before = _mm_getcsr();
  glmx::parallel_items(
      100, [](void* context, int64_t item) { static_cast<int*>(context)[item] += (_mm_getcsr() & 0x8040u) == 0x8040u ? 1 : 100; },
      seen.data());
  for (int n : seen) CHECK(n == 1, n);
  CHECK(_mm_getcsr() == before);
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
