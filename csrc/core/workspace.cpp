// thread_scratch: grow-only buffers in thread-local storage.
#include "core/workspace.h"

#include <algorithm>
#include <cstdlib>

#include "core/fatal.h"

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
    if (buffer.data == nullptr) fatal("out of memory: kernel scratch");
  }
  return buffer.data;
}

}  // namespace glmx
