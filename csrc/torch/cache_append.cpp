// torch.ops.glmx.cache_append
#include "torch/bind.h"

namespace glmx::bind {
namespace {

void append(Tensor cache, const Tensor& rows, const Tensor& slot_mapping, int64_t column) {
  CacheAppendParams p{};
  p.dtype = model_dtype(rows, "rows");
  p.rows = data(rows, "rows", p.dtype, {kAny, kAny});
  p.T = rows.size(0);
  p.W = rows.size(1);
  p.slot_mapping = data_as<int64_t>(slot_mapping, "slot_mapping", DType::i64, {p.T});
  p.cache = data(cache, "cache", p.dtype, {kAny, kAny});
  p.cache_rows = cache.size(0);
  p.stride = cache.size(1);
  p.column = column;
  run(cache_append, p);
}

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY_FRAGMENT(glmx, m) { m.def("cache_append(Tensor(a!) cache, Tensor rows, Tensor slot_mapping, int column) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(glmx, CPU, m) { m.impl("cache_append", TORCH_BOX(&glmx::bind::append)); }
