// cache_append / base: cache[slot_mapping[t], column ..] = rows[t]
// Contract   include/glmx/ops.h CacheAppendParams   Oracle reference/cache_append.py   Doc docs/ops/cache_append.md
// Shapes     rows [T,W] dtype | slot_mapping [T] i64 | cache [cache_rows,stride] dtype
// Layout     row-major; any W, any column
// Numerics   none: bits are copied
// Algorithm  a work item is a slice of kSlice bytes of every row, tokens in order: no two threads write one place, so that where a slot is
//            named twice the later token stays for any number of threads
// Work/bytes T*W elements read and written: bound by memory
// Measured   not measured yet (speed is step 5)
// Limits     slots and sizes are checked in ops/cache_append.cpp
#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "cpu/kernels.h"

namespace glmx::cpu::base {
namespace {

constexpr int64_t kSlice = 512;  // bytes: 8 cache lines, so that the hardware prefetches within a row; a latent of 576 bf16 has 3 slices

void copy_slice(void* context, int64_t slice) {
  const CacheAppendParams& p = *static_cast<const CacheAppendParams*>(context);
  const int64_t size = dtype_size(p.dtype), begin = slice * kSlice, left = p.W * size - begin;
  const char* from = static_cast<const char*>(p.rows) + begin;
  char* to = static_cast<char*>(p.cache) + p.column * size + begin;
  for (int64_t t = 0; t < p.T; ++t) {
    if (p.slot_mapping[t] < 0) continue;
    std::memcpy(to + p.slot_mapping[t] * p.stride * size, from + t * p.W * size, static_cast<size_t>(left < kSlice ? left : kSlice));
  }
}

}  // namespace

void cache_append(const CacheAppendParams& p) {
  const int64_t bytes = p.W * dtype_size(p.dtype);
  parallel_items((bytes + kSlice - 1) / kSlice, p.T * bytes / 8, copy_slice, const_cast<CacheAppendParams*>(&p));
}

}  // namespace glmx::cpu::base
