// embedding: y[t] = weight[ids[t]]; backward d_weight[v] = sum of dy[t] over the tokens with id v
// Contract   include/glmx/ops.h EmbeddingParams   Oracle reference/embedding.py   Doc docs/ops/embedding.md
// Shapes     ids [T] i64 | weight [V,H], y, dy [T,H] dtype | d_weight [V,H] f32 | offsets [V+1], order [T] i32
// Layout     row-major, any H; the last columns run the same code on masked lanes
// Numerics   forward: a copy. Backward: fp32 additions from +0 in the order of tokens, then one addition if accumulating
// Algorithm  forward: an item is 64 tokens. Backward: ops/embedding.cpp sorts the tokens by id (stable); an item is 64 rows of the
//            vocabulary, and a row adds its tokens 64 columns at a time in registers, so no two threads meet and no order can show
// Work/bytes T*H additions; T*H elements read, V*H f32 written: bound by memory
// Measured   one core of a shared AMD EPYC (Zen 4), see docs/ops/embedding.md
// Limits     ids are checked in ops/embedding.cpp

#include "cpu/inl/rows.inl"

constexpr int64_t kTokens = 64, kVocabulary = 64;
constexpr int kWide = 4;  // V16 per pass: four accumulators hide the latency of an addition

inline void copy_block(void* context, int64_t block) {
  const EmbeddingParams& p = *static_cast<const EmbeddingParams*>(context);
  const int64_t bytes = p.H * dtype_size(p.dtype), end = min_i64((block + 1) * kTokens, p.T);
  const char* weight = static_cast<const char*>(p.weight);
  char* y = static_cast<char*>(p.y);
  for (int64_t t = block * kTokens; t < end; ++t) std::memcpy(y + t * bytes, weight + p.ids[t] * bytes, static_cast<size_t>(bytes));
}

inline void embedding_forward(const EmbeddingParams& p) {
  parallel_items((p.T + kTokens - 1) / kTokens, p.T * p.H * dtype_size(p.dtype) / 8, copy_block, const_cast<EmbeddingParams*>(&p));
}

template <class T>
void sum_tokens(const EmbeddingBackwardParams& p, int64_t v) {
  const T* dy = static_cast<const T*>(p.dy);
  float* out = p.d_weight + v * p.H;
  const int32_t *begin = p.order + p.offsets[v], *end = p.order + p.offsets[v + 1];
  if (p.accumulate && begin == end) return;
  int64_t i = 0;
  for (; i + 16 * kWide <= p.H; i += 16 * kWide) {
    V16 sum[kWide] = {zero(), zero(), zero(), zero()};
    for (const int32_t* t = begin; t != end; ++t) {
      for (int j = 0; j < kWide; ++j) sum[j] = add(sum[j], load(dy + *t * p.H + i + 16 * j));
    }
    for (int j = 0; j < kWide; ++j) store(out + i + 16 * j, p.accumulate ? add(load(out + i + 16 * j), sum[j]) : sum[j]);
  }
  for (; i < p.H; i += 16) {
    const int n = lanes(p.H - i);
    V16 sum = zero();
    for (const int32_t* t = begin; t != end; ++t) sum = add(sum, load_n(dy + *t * p.H + i, n));
    store_n(out + i, p.accumulate ? add(load_n(out + i, n), sum) : sum, n);
  }
}

template <class T>
void sum_block(void* context, int64_t block) {
  const EmbeddingBackwardParams& p = *static_cast<const EmbeddingBackwardParams*>(context);
  const int64_t end = min_i64((block + 1) * kVocabulary, p.V);
  for (int64_t v = block * kVocabulary; v < end; ++v) sum_tokens<T>(p, v);
}

inline void embedding_backward_rows(const EmbeddingBackwardParams& p) {
  void* context = const_cast<EmbeddingBackwardParams*>(&p);
  parallel_items((p.V + kVocabulary - 1) / kVocabulary, (p.T + p.V) * p.H / 4,
                 p.dtype == DType::bf16 ? sum_block<uint16_t> : sum_block<float>, context);
}
