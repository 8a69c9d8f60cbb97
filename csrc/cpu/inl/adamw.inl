// adamw: one update of fp32 masters and their moments, rounded to the parameters
// Contract   include/glmx/ops.h AdamwParams   Oracle reference/adamw.py   Doc docs/ops/adamw.md
// Shapes     param [n] dtype | master, exp_avg, exp_avg_sq, grad [n] fp32, all written
// Layout     any contiguous shape, taken as one row; the last elements run the same code on masked lanes
// Numerics   the chain of ops.h: mul, add, div and sqrt, each rounded once, so an element's bits depend on nothing else
// Algorithm  one pass; an item is 16,384 elements
// Work/bytes about 14*n flop; 16*n bytes read, 16*n written (18*n for bf16): bound by memory
// Measured   see docs/ops/adamw.md
// Limits     none

#include "cpu/inl/rows.inl"

constexpr int64_t kAdamwItem = 16384;

template <class T>
void adamw_item(void* context, int64_t item) {
  const AdamwParams& p = *static_cast<const AdamwParams*>(context);
  T* param = static_cast<T*>(p.param);
  const V16 grad_scale = set1(p.grad_scale), beta1 = set1(p.beta1), rest1 = set1(p.rest1), beta2 = set1(p.beta2), rest2 = set1(p.rest2);
  const V16 keep = set1(p.keep), root = set1(p.root), eps = set1(p.eps), rate = set1(p.rate);
  const int64_t end = min_i64(p.n, (item + 1) * kAdamwItem);
  for (int64_t i = item * kAdamwItem; i < end; i += 16) {
    const int n = lanes(end - i);
    fetch_ahead(p.grad + i), fetch_ahead(p.exp_avg + i), fetch_ahead(p.exp_avg_sq + i), fetch_ahead(p.master + i);
    const V16 g = mul(load_n(p.grad + i, n), grad_scale);
    const V16 m = add(mul(load_n(p.exp_avg + i, n), beta1), mul(g, rest1));
    const V16 v = add(mul(load_n(p.exp_avg_sq + i, n), beta2), mul(mul(g, g), rest2));
    const V16 step = mul(div(m, add(mul(sqrt(v), root), eps)), rate);
    const V16 master = sub(mul(load_n(p.master + i, n), keep), step);
    store_n(p.grad + i, zero(), n);
    store_n(p.exp_avg + i, m, n);
    store_n(p.exp_avg_sq + i, v, n);
    store_n(p.master + i, master, n);
    store_n(param + i, master, n);
  }
}

inline void adamw_update(const AdamwParams& p) {
  parallel_items((p.n + kAdamwItem - 1) / kAdamwItem, p.n, p.dtype == DType::bf16 ? adamw_item<uint16_t> : adamw_item<float>,
                 const_cast<AdamwParams*>(&p));
}
