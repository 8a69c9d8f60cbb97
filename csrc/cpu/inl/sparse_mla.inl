// sparse_mla: absorbed MLA: the heads of a query token attend to the listed keys of one latent cache; its gradients
// Contract   include/glmx/ops.h SparseMlaParams   Oracle reference/sparse_mla.py   Doc docs/ops/sparse_mla.md
// Shapes     q [T,A,Dk] | kv [rows,Dk], its first Dv the values | topk_indices [T,top_k] i32 | out [T,A,Dv] | lse [T,A] f32
// Layout     the heads of a token are the rows of tiles; 64 listed rows are gathered into the item's scratch (one copy for scores and
//            values) unless they lie side by side, and are then packed as attention packs its keys
// Numerics   ops.h, "Attention", over the list: a list of all keys in order gives the bits of attention. d_kv: token by token in order, so
//            a key's sum does not depend on how tokens are grouped
// Algorithm  forward and d_q: work item = (token, block of heads). d_kv: blocks of tokens; items over tokens leave p and ds in the
//            workspace, then items over ranges of cache rows add each token's products to the rows of theirs that it lists
// Work/bytes forward 2*A*(Dk + Dv) flop per listed key and token, Dk elements: bound by arithmetic from about 8 heads
// Measured   see docs/ops/sparse_mla.md
// Limits     checked in ops/sparse_mla.cpp
#include "cpu/inl/key_lists.inl"

constexpr int64_t kMlaItemFloats = 80 * 1024;  // as in attention: 75 heads of 576 + 512 values
constexpr int64_t kPackedHeads = 8;            // whose products take about as long as gathering and packing the keys, which each item does

// A call's tokens [token0, token0 + tokens), and how their heads are cut into items. Which heads share an item changes no bits.
template <class Unit, class Params>
struct MlaCall {
  static constexpr int64_t kTileRows = Unit::kTileRows;
  const Params& p;
  int64_t token0, tokens, head_blocks = 0, heads = 0;  // blocks per token, heads per block
  MlaCall(const Params& params, int64_t first, int64_t count) : p(params), token0(first), tokens(count) {
    const int64_t tiles = (p.A + kTileRows - 1) / kTileRows, most = kMlaItemFloats / (p.Dk + p.Dv) / kTileRows + 1;
    const int64_t threads = work_ns(2) < kSmallWorkNs ? 1 : parallel_threads();
    // A decode step has few tokens: their heads are split over items, so that the thread with the most of them has little to do.
    int64_t least_time = 0;
    for (int64_t blocks = (tiles + most - 1) / most; blocks <= tiles; ++blocks) {
      const int64_t each = (tiles + blocks - 1) / blocks * kTileRows,
                    time = (tokens * blocks + threads - 1) / threads * (each + kPackedHeads);
      if (heads != 0 && time >= least_time) continue;
      heads = each;
      least_time = time;
    }
    head_blocks = (p.A + heads - 1) / heads;
  }
  int64_t items() const { return tokens * head_blocks; }
  int64_t work_ns(int64_t products) const { return tokens * p.A * p.top_k * (p.Dk + p.Dv) * products / 50; }
  // body(rows, keys, token)
  template <class Body>
  void at(int64_t item, Body body) const {
    using T = typename Unit::T;
    const int64_t token = token0 + item / head_blocks, first = item % head_blocks * heads;
    const int32_t* list = p.topk_indices + token * p.top_k;
    const QueryRows rows{token, 0, p.A, p.A, first, least(heads, p.A - first), list_length(list, p.top_k)};
    body(rows, ListedKeys<T>{p.sequences, sequence_of(p.sequences, token), list, static_cast<const T*>(p.kv), p.Dk}, token);
  }
};

template <class Unit, class T = typename Unit::T>
void mla_forward_item(void* context, int64_t item) {
  const auto& call = *static_cast<const MlaCall<Unit, SparseMlaParams>*>(context);
  const SparseMlaParams& p = call.p;
  [[maybe_unused]] const typename Unit::Session session;
  call.at(item, [&](const QueryRows& rows, const ListedKeys<T>& keys, int64_t) {
    attend<Unit>(rows, keys, 1, {p.Dk, p.Dv, p.scale}, static_cast<const T*>(p.q), static_cast<T*>(p.out), p.lse);
  });
}

template <class Unit>
void mla_forward_of(const SparseMlaParams& p) {
  MlaCall<Unit, SparseMlaParams> call(p, 0, p.sequences.T);
  parallel_items(call.items(), call.work_ns(2), mla_forward_item<Unit>, &call);
}

inline void mla_forward(const SparseMlaParams& p) {
  p.dtype == DType::bf16 ? mla_forward_of<FmaUnit<uint16_t>>(p) : mla_forward_of<FmaUnit<float>>(p);
}

template <class T>
void mla_delta_item(void* context, int64_t item) {
  const SparseMlaBackwardParams& p = *static_cast<const SparseMlaBackwardParams*>(context);
  const int64_t end = least(p.sequences.T * p.A, (item + 1) * kBlockKeys);
  for (int64_t r = item * kBlockKeys; r < end; ++r) {
    p.delta[r] = gradient_delta(static_cast<const T*>(p.d_out) + r * p.Dv, static_cast<const T*>(p.out) + r * p.Dv, p.Dv);
  }
}

// The p and ds of the tokens of a block: [tokens][blocks of keys][A][kBlockKeys], each.
struct MlaScores {
  float *p, *ds;
  int64_t A, key_blocks;
  int64_t at(int64_t token, int64_t key_block, int64_t head) const { return ((token * key_blocks + key_block) * A + head) * kBlockKeys; }
};

template <class Unit>
struct MlaBlock {
  const SparseMlaBackwardParams& p;
  MlaCall<Unit, SparseMlaBackwardParams> call;
  MlaScores scores;
};

struct ScoreSink {
  const MlaScores& scores;
  int64_t token, head, rows;
  void block(int64_t first, int64_t, const float* p, const float* ds) const {
    const int64_t at = scores.at(token, first / kBlockKeys, head);
    std::memcpy(scores.p + at, p, static_cast<size_t>(rows * kBlockKeys) * 4);
    std::memcpy(scores.ds + at, ds, static_cast<size_t>(rows * kBlockKeys) * 4);
  }
};

template <class Unit, class T = typename Unit::T>
void mla_query_gradient_item(void* context, int64_t item) {
  const auto& block = *static_cast<const MlaBlock<Unit>*>(context);
  [[maybe_unused]] const typename Unit::Session session;
  const SparseMlaBackwardParams& p = block.p;
  const AttendGradient<T> in{static_cast<const T*>(p.q), static_cast<const T*>(p.d_out), p.lse, p.delta};
  block.call.at(item, [&](const QueryRows& rows, const ListedKeys<T>& keys, int64_t token) {
    const ScoreSink sink{block.scores, token - block.call.token0, rows.first, rows.count};
    attend_query_gradient<Unit>(rows, keys, {p.Dk, p.Dv, p.scale}, in, static_cast<T*>(p.d_q), sink);
  });
}

template <class Unit, class T = typename Unit::T>
void mla_key_gradient_item(void* context, int64_t item) {
  const auto& block = *static_cast<const MlaBlock<Unit>*>(context);
  const SparseMlaBackwardParams& p = block.p;
  const int64_t range = item * kCacheRange;
  const auto plan = plan_in_scratch<AddPlan<T>>(p.Dk);
  for (int64_t t = 0; t < block.call.tokens; ++t) {
    const int64_t token = block.call.token0 + t;
    const int64_t first_row = p.sequences.cu_seqlens_k[sequence_of(p.sequences, token)];
    const int32_t* list = p.topk_indices + token * p.top_k;
    const int64_t n = list_length(list, p.top_k);
    const int64_t begin = list_position(list, n, range - first_row), end = list_position(list, n, range + kCacheRange - first_row);
    if (begin == end) continue;
    const auto row = [&](int64_t position) { return p.sums + (first_row + list[position]) * p.Dk; };
    const int64_t at = block.scores.at(t, 0, 0);
    add_token(plan, p.A, block.scores.ds + at, begin, end, static_cast<const T*>(p.q) + token * p.A * p.Dk, p.Dk, row);
    add_token(plan, p.A, block.scores.p + at, begin, end, static_cast<const T*>(p.d_out) + token * p.A * p.Dv, p.Dv, row);
  }
}

template <class T>
void mla_store_item(void* context, int64_t item) {
  const SparseMlaBackwardParams& p = *static_cast<const SparseMlaBackwardParams*>(context);
  const int64_t end = least(p.sequences.key_rows, (item + 1) * kCacheRange);
  for (int64_t r = item * kCacheRange; r < end; ++r) store_gradient(p.sums + r * p.Dk, p.Dk, static_cast<T*>(p.d_kv) + r * p.Dk);
}

template <class Unit, class T = typename Unit::T>
void mla_backward_of(const SparseMlaBackwardParams& p) {
  void* context = const_cast<SparseMlaBackwardParams*>(&p);
  const int64_t T_all = p.sequences.T, rows = p.sequences.key_rows, ranges = (rows + kCacheRange - 1) / kCacheRange;
  parallel_items((T_all * p.A + kBlockKeys - 1) / kBlockKeys, T_all * p.A * p.Dv / 8, mla_delta_item<T>, context);
  std::memset(p.sums, 0, static_cast<size_t>(rows * p.Dk) * 4);
  const int64_t key_blocks = (p.top_k + kBlockKeys - 1) / kBlockKeys;
  for (int64_t token = 0; token < T_all; token += p.score_tokens) {
    MlaBlock<Unit> block{p, {p, token, least(p.score_tokens, T_all - token)}, {p.scores, nullptr, p.A, key_blocks}};
    block.scores.ds = block.scores.at(p.score_tokens, 0, 0) + p.scores;
    parallel_items(block.call.items(), block.call.work_ns(3), mla_query_gradient_item<Unit>, &block);
    parallel_items(ranges, block.call.work_ns(2), mla_key_gradient_item<Unit>, &block);
  }
  parallel_items(ranges, rows * p.Dk / 8, mla_store_item<T>, context);
}

inline void mla_backward(const SparseMlaBackwardParams& p) {
  p.dtype == DType::bf16 ? mla_backward_of<FmaUnit<uint16_t>>(p) : mla_backward_of<FmaUnit<float>>(p);
}
