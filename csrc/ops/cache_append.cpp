// cache_append: checks and kernel choice.
#include "core/check.h"
#include "core/dispatch.h"
#include "cpu/kernels.h"
#include "ops/registry.h"

namespace glmx {
namespace {
using Fn = void(const CacheAppendParams&);
constexpr Kernel<Fn> kKernels[] = {{Isa::base, cpu::base::cache_append}};
}  // namespace

OpInfo cache_append_info() { return op_info("cache_append", "", kCacheAppendRevision, kKernels); }

void cache_append(const CacheAppendParams& p) {
  const char* op = "cache_append";
  GLMX_CHECK(p.column >= 0 && p.column <= p.stride - p.W, op, ": expected column in [0, ", p.stride - p.W, "], for rows of ", p.W,
             " in a cache of ", p.stride, " columns: got ", p.column);
  for (int64_t t = 0; t < p.T; ++t) {
    const int64_t slot = p.slot_mapping[t];
    GLMX_CHECK(slot >= -1 && slot < p.cache_rows, op, ": expected slot_mapping in [-1, ", p.cache_rows, "), the rows of the cache: got ",
               slot, " at ", t);
  }
  select(kKernels).fn(p);
}

}  // namespace glmx
