// thread_scratch: grow-only buffers in thread-local storage.
#include "core/workspace.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

namespace glmx {
namespace {

struct Buffer {
  void* data = nullptr;
  int64_t size = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

void* thread_scratch(Scratch slot, int64_t bytes) {
  thread_local Buffer buffers[2];
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (buffer.size < bytes) {
    std::free(buffer.data);
    const int64_t size = (std::max(bytes, buffer.size + buffer.size / 2) + 63) / 64 * 64;
    buffer.data = std::aligned_alloc(64, static_cast<size_t>(size));
    buffer.size = size;
    if (buffer.data == nullptr) {
      std::fprintf(stderr, "glmx: out of memory: %lld bytes of kernel scratch\n", static_cast<long long>(size));
      std::abort();
    }
  }
  return buffer.data;
}

}  // namespace glmx
