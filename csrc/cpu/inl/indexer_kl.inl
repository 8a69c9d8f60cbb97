// indexer_kl: KL(attention averaged over the main heads || softmax of the index scores) of each query token; its gradients to the indexer
// Contract   include/glmx/ops.h IndexerKlParams   Oracle reference/indexer_kl.py   Doc docs/ops/indexer_kl.md
// Shapes     index_q [T,Hi,Di] | index_weights [T,Hi] f32 | index_k [rows,Di] | q [T,A,Dk] | kv [rows,Dk] | lse [T,A] f32 | kl [T] f32
// Layout     the heads of a token are the rows of tiles, main and index heads apart; listed rows are gathered as in sparse_mla. Without
//            lists, neighbouring tokens share each block of keys, so that its panels are packed once for all of them
// Numerics   ops.h. Everything of a token is a walk over its own list in blocks of 64 places, whoever shares the item. d_index_k: token by
//            token in order, so a key's sum does not depend on how tokens are grouped
// Algorithm  forward, d_index_q, d_index_weights: work item = a group of tokens: scores of a block of keys by tiles, then p and I by
//            vectors. d_index_k: blocks of tokens; their items leave g in the workspace, then items over ranges of key rows add it up
// Work/bytes forward 2*(A*Dk + Hi*Di) flop and A + 1 exponentials per listed key and token; backward + 4*Hi*Di flop
// Measured   see docs/ops/indexer_kl.md
// Limits     checked in ops/indexer_kl.cpp
#include "cpu/inl/index_score.inl"
#include "cpu/inl/key_lists.inl"

// Rows of an item's tiles: as in attention, queries of 80K floats stay in L2; beyond 192 rows packing keys is free.
constexpr int64_t kKlItemFloats = 80 * 1024, kKlItemRows = 192;

// Neighbouring tokens of a sequence: the first sees or lists `keys` keys, each one more than the one before it. With lists: one token.
struct TokenGroup {
  int64_t sequence, token, count, keys;
};

// The keys of a sequence, as they lie.
template <class T>
struct VisibleKeys {
  static constexpr int64_t kGathered = 0;
  const T* rows;
  int64_t D;
  KeyBlock<T> block(int64_t first, int64_t, T*) const { return {rows + first * D, rows + first * D, D, D}; }
};

// A call's tokens [token0, token0 + tokens), and how they are cut into groups. Params is of the forward or the backward.
template <class Params>
struct KlCall {
  const Params& p;
  int64_t token0, tokens, group_tokens, items;
  int64_t begin(int64_t sequence) const {
    return p.sequences.cu_seqlens_q[sequence] < token0 ? token0 : p.sequences.cu_seqlens_q[sequence];
  }
  int64_t end(int64_t sequence) const { return least(p.sequences.cu_seqlens_q[sequence + 1], token0 + tokens); }
  int64_t groups(int64_t sequence) const {
    const int64_t n = end(sequence) - begin(sequence);
    return n <= 0 ? 0 : (n + group_tokens - 1) / group_tokens;
  }
  // All items on one core: 2 flop at about 40 GFLOP/s, and 2 ns for an exponential; `index_products` with index heads.
  int64_t work_ns(int64_t index_products) const {
    int64_t pairs = tokens * p.top_k;
    for (int64_t i = 0; p.topk_indices == nullptr && i < p.sequences.B; ++i) {
      if (end(i) > begin(i)) pairs += (end(i) - begin(i)) * p.sequences.seq_lens[i];
    }
    return pairs * (p.A * (p.Dk + 40) + index_products * p.Hi * p.Di) / 20;
  }
  KlCall(const Params& params, int64_t first, int64_t count) : p(params), token0(first), tokens(count), group_tokens(1), items(count) {
    if (p.topk_indices != nullptr) return;
    const int64_t heads = p.A < p.Hi ? p.Hi : p.A;
    group_tokens = least(kKlItemRows, kKlItemFloats / (p.Dk + p.Di) + 1) / heads;
    if (group_tokens < 1) group_tokens = 1;
    for (;; group_tokens = (group_tokens + 1) / 2) {  // every thread gets two items, if there are tokens for them
      items = 0;
      for (int64_t i = 0; i < p.sequences.B; ++i) items += groups(i);
      if (group_tokens == 1 || items >= 2 * parallel_threads()) return;
    }
  }
  // body(group, keys of kv, keys of index_k). Late tokens see the most keys: they come first, so that no thread is left with them.
  template <class T, class Body>
  void at(int64_t item, Body body) const {
    const Sequences& s = p.sequences;
    const T *kv = static_cast<const T*>(p.kv), *index_k = static_cast<const T*>(p.index_k);
    if (p.topk_indices != nullptr) {
      const int64_t token = token0 + item, sequence = sequence_of(s, token);
      const int32_t* list = p.topk_indices + token * p.top_k;
      return body(TokenGroup{sequence, token, 1, list_length(list, p.top_k)}, ListedKeys<T>{s, sequence, list, kv, p.Dk},
                  ListedKeys<T>{s, sequence, list, index_k, p.Di});
    }
    item = items - 1 - item;
    for (int64_t i = 0; i < s.B; item -= groups(i), ++i) {
      if (item >= groups(i)) continue;
      const int64_t token = begin(i) + item * group_tokens, row = s.cu_seqlens_k[i];
      return body(TokenGroup{i, token, least(group_tokens, end(i) - token), visible_keys(s, i, token)},
                  VisibleKeys<T>{kv + row * p.Dk, p.Dk}, VisibleKeys<T>{index_k + row * p.Di, p.Di});
    }
  }
};

// What the forward and the backward of a group have in common: the scores of one block of keys.
template <class T>
struct KlPlan {
  Word<T>*q, *index_q;         // tiles
  Word<T>*panel, *room;        // room: of the backward
  float *s, *dots;             // [rows][kBlockKeys]: scores of the main heads; relu(dot) of the index heads
  float *p, *scores;           // [tokens][kBlockKeys]
  float *acc, *d_w;            // acc [index rows][ld], d_w [index rows][16]: of the backward
  int32_t *seen, *index_seen;  // per row
  T *kv, *index_k;             // gathered rows
  int64_t ld;
  template <class Params>
  KlPlan(Pieces& pieces, const Params& shape, int64_t tokens, int64_t gathered_rows, bool backward) : ld(round_up(shape.Di, kCols)) {
    const int64_t main_rows = round_up(tokens * shape.A, kRows), index_rows = round_up(tokens * shape.Hi, kRows);
    q = pieces.take<Word<T>>(main_rows * row_words<T>(shape.Dk));
    index_q = pieces.take<Word<T>>(index_rows * row_words<T>(shape.Di));
    s = pieces.take(main_rows * kBlockKeys);
    dots = pieces.take(index_rows * kBlockKeys);
    p = pieces.take(tokens * kBlockKeys);
    scores = pieces.take(tokens * kBlockKeys);
    panel = pieces.take<Word<T>>(kPanelWords);
    room = pieces.take<Word<T>>(backward ? weight_room<Word<T>>(index_rows) : 0);
    acc = pieces.take(backward ? index_rows * ld : 0);
    d_w = pieces.take(backward ? index_rows * 16 : 0);
    seen = pieces.take<int32_t>(main_rows);
    index_seen = pieces.take<int32_t>(index_rows);
    kv = reinterpret_cast<T*>(pieces.take(gathered_rows * shape.Dk));
    index_k = reinterpret_cast<T*>(pieces.take(gathered_rows * shape.Di));
  }
};

// p of one token's block from the scores of its heads [A][kBlockKeys]: the mean over the heads; 0 where it does not see the key.
inline void mean_probabilities(const float* s, int64_t A, const float* lse, float scale, int32_t seen, float* p) {
  for (int64_t j = 0; j < kBlockKeys; j += 16) {
    V16 sum = zero();
    for (int64_t a = 0; a < A; ++a) {
      sum = add(sum, exp16_below_88(sub(mul(load(s + a * kBlockKeys + j), set1(scale)), set1(lse[a]))));
    }
    store(p + j, if_seen(seen, j, div(sum, set1(static_cast<float>(A))), zero()));
  }
}

// dots become relu(dot), 0 where the token does not see the key; scores its index scores, there -inf.
inline void index_scores(float* dots, int64_t Hi, const float* weights, int32_t seen, float* scores) {
  for (int64_t j = 0; j < kBlockKeys; j += 16) {
    V16 score[1];
    index_scores_of(dots + j, kBlockKeys, weights, Hi, score);
    store(scores + j, if_seen(seen, j, score[0], set1(-__builtin_inff())));
    for (int64_t h = 0; h < Hi; ++h) {
      float* at = dots + h * kBlockKeys + j;
      store(at, if_seen(seen, j, relu16(load(at)), zero()));
    }
  }
}

// Walks the blocks of a group's keys. body(first, n, from, index block): plan.p, .scores and .dots are filled for tokens [from, count).
template <class T, class Params, class Keys, class Body>
inline void walk_blocks(const Params& p, const TokenGroup& group, const Keys& kv, const Keys& index_k, const KlPlan<T>& plan, Body body) {
  const QueryRows rows{group.token, 0, p.A, p.A, 0, group.count * p.A, group.keys};
  const QueryRows index_rows{group.token, 0, p.Hi, p.Hi, 0, group.count * p.Hi, group.keys};
  pack_query_tiles(rows, static_cast<const T*>(p.q), p.Dk, plan.q);
  pack_query_tiles(index_rows, static_cast<const T*>(p.index_q), p.Di, plan.index_q);
  const int64_t all = group.keys + group.count - 1;
  for (int64_t first = 0; first < all; first += kBlockKeys) {
    const int64_t n = least(kBlockKeys, all - first);
    const KeyBlock<T> block = kv.block(first, n, plan.kv), index_block = index_k.block(first, n, plan.index_k);
    const int64_t from = count_seen(rows, first, n, kRows, plan.seen),
                  index_from = count_seen(index_rows, first, n, kRows, plan.index_seen);
    queries_times_keys(plan.q, from, rows.count, block.k, block.k_stride, n, p.Dk, plan.panel, plan.s);
    queries_times_keys(plan.index_q, index_from, index_rows.count, index_block.k, index_block.k_stride, n, p.Di, plan.panel, plan.dots);
    int64_t token = 0;
    while (plan.seen[token * p.A] == 0) ++token;  // the last token sees them all
    for (int64_t i = token; i < group.count; ++i) {
      const int32_t seen = plan.seen[i * p.A];
      mean_probabilities(plan.s + i * p.A * kBlockKeys, p.A, p.lse + (group.token + i) * p.A, p.scale, seen, plan.p + i * kBlockKeys);
      index_scores(plan.dots + i * p.Hi * kBlockKeys, p.Hi, p.index_weights + (group.token + i) * p.Hi, seen, plan.scores + i * kBlockKeys);
    }
    body(first, n, token, index_block);
  }
}

// A token's way through its blocks.
struct KlState {
  float max;
  double sum, mass, energy;
};

inline void kl_step(const float* p, const float* scores, KlState* state) {
  V16 high = set1(-__builtin_inff());
  for (int64_t j = 0; j < kBlockKeys; j += 16) high = max(high, load(scores + j));
  const float block_max = fold_max(high), next = state->max < block_max ? block_max : state->max;
  const float base = next == -__builtin_inff() ? 0.0f : next;  // -inf - -inf would be NaN
  V16 sum = zero(), mass = zero(), energy = zero();
  for (int64_t j = 0; j < kBlockKeys; j += 16) {
    const V16 x = load(scores + j), probability = load(p + j);
    sum = add(sum, exp16_below_88(sub(x, set1(base))));
    mass = add(mass, probability);
    const V16 term = fma(probability, sub(log16(probability), x), energy);
    energy = select_lt(probability, set1(0x1p-126f), energy, term);  // 0, since denormals are flushed; false for NaN
  }
  alignas(64) float alpha[16];
  store(alpha, exp16_below_88(set1(state->max - base)));
  state->max = next;
  state->sum = fma64(state->sum, static_cast<double>(alpha[0]), static_cast<double>(fold_add(sum)));
  state->mass = state->mass + static_cast<double>(fold_add(mass));
  state->energy = state->energy + static_cast<double>(fold_add(energy));
}

template <class T>
void kl_forward_item(void* context, int64_t item) {
  const auto& call = *static_cast<const KlCall<IndexerKlParams>*>(context);
  const IndexerKlParams& p = call.p;
  call.template at<T>(item, [&](const TokenGroup& group, const auto& kv, const auto& index_k) {
    const auto plan = plan_in_scratch<KlPlan<T>>(p, group.count, kv.kGathered, false);
    KlState states[kKlItemRows];
    for (int64_t i = 0; i < group.count; ++i) states[i] = {-__builtin_inff(), 0.0, 0.0, 0.0};
    walk_blocks(p, group, kv, index_k, plan, [&](int64_t, int64_t, int64_t from, const KeyBlock<T>&) {
      for (int64_t i = from; i < group.count; ++i) kl_step(plan.p + i * kBlockKeys, plan.scores + i * kBlockKeys, &states[i]);
    });
    for (int64_t i = 0; i < group.count; ++i) {
      const int64_t token = group.token + i;
      const bool any_key = group.keys + i > 0;
      const double lse = any_key ? static_cast<double>(states[i].max) + log64(states[i].sum) : 0.0;
      p.kl[token] = static_cast<float>(fma64(lse, states[i].mass, states[i].energy));
      if (p.index_lse != nullptr) p.index_lse[token] = any_key ? static_cast<float>(lse) : __builtin_inff();
      if (p.mass != nullptr) p.mass[token] = static_cast<float>(states[i].mass);
    }
  });
}

template <class T>
void kl_forward_of(const IndexerKlParams& p) {
  KlCall<IndexerKlParams> call(p, 0, p.sequences.T);
  parallel_items(call.items, call.work_ns(1), kl_forward_item<T>, &call);
}

inline void kl_forward(const IndexerKlParams& p) { p.dtype == DType::bf16 ? kl_forward_of<uint16_t>(p) : kl_forward_of<float>(p); }

// One token's block: scores become dI; relu(dot) becomes g; d_w[h] takes its lanes.
template <class T>
inline void kl_gradient(const float* p, float* scores, float* relus, const float* weights, int64_t Hi, int32_t seen, float index_lse,
                        float mass, float d_kl, float* d_w) {
  const T* rounding = nullptr;
  for (int64_t j = 0; j < kBlockKeys; j += 16) {
    const V16 softmax = exp16_below_88(sub(load(scores + j), set1(index_lse)));
    const V16 d = mul(fma(softmax, set1(mass), sub(zero(), load(p + j))), set1(d_kl));
    store(scores + j, if_seen(seen, j, d, zero()));
  }
  for (int64_t h = 0; h < Hi; ++h, relus += kBlockKeys, d_w += 16) {
    V16 sum = load(d_w);
    for (int64_t j = 0; j < kBlockKeys; j += 16) {
      const V16 relu = load(relus + j), d = load(scores + j);
      sum = fma(d, relu, sum);
      store(relus + j, select_lt(zero(), relu, round_to(mul(d, set1(weights[h])), rounding), zero()));
    }
    store(d_w, sum);
  }
}

// The g of a block of tokens: [tokens][score_blocks][Hi][kBlockKeys].
struct KlTokens {
  const IndexerKlBackwardParams& p;
  KlCall<IndexerKlBackwardParams> call;
  float* g(int64_t token, int64_t key_block) const {
    return p.scores + ((token - call.token0) * p.score_blocks + key_block) * p.Hi * kBlockKeys;
  }
};

template <class T>
void kl_query_gradient_item(void* context, int64_t item) {
  const KlTokens& tokens = *static_cast<const KlTokens*>(context);
  const IndexerKlBackwardParams& p = tokens.p;
  const int64_t width = p.Hi * kBlockKeys;
  tokens.call.template at<T>(item, [&](const TokenGroup& group, const auto& kv, const auto& index_k) {
    const auto plan = plan_in_scratch<KlPlan<T>>(p, group.count, kv.kGathered, true);
    const int64_t rows = group.count * p.Hi;
    std::memset(plan.acc, 0, static_cast<size_t>(rows * plan.ld) * 4);
    std::memset(plan.d_w, 0, static_cast<size_t>(rows * 16) * 4);
    walk_blocks(p, group, kv, index_k, plan, [&](int64_t first, int64_t n, int64_t from, const KeyBlock<T>& block) {
      for (int64_t i = from; i < group.count; ++i) {
        const int64_t token = group.token + i;
        float* g = plan.dots + i * width;
        kl_gradient<T>(plan.p + i * kBlockKeys, plan.scores + i * kBlockKeys, g, p.index_weights + token * p.Hi, p.Hi,
                       plan.index_seen[i * p.Hi], p.index_lse[token], p.mass[token], p.d_kl[token], plan.d_w + i * p.Hi * 16);
        std::memcpy(tokens.g(token, first / kBlockKeys), g, static_cast<size_t>(width) * 4);
      }
      queries_times_values(plan.dots, plan.index_seen, from * p.Hi, rows, block.k, block.k_stride, n, p.Di, plan.room, plan.panel, plan.acc,
                           plan.ld);
    });
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = group.token * p.Hi + i;
      store_gradient(plan.acc + i * plan.ld, p.Di, static_cast<T*>(p.d_index_q) + row * p.Di);
      p.d_index_weights[row] = fold_add(load(plan.d_w + i * 16));
    }
  });
}

template <class T>
void kl_key_gradient_item(void* context, int64_t item) {
  const KlTokens& tokens = *static_cast<const KlTokens*>(context);
  const IndexerKlBackwardParams& p = tokens.p;
  const Sequences& s = p.sequences;
  const int64_t range = item * kCacheRange;
  const auto plan = plan_in_scratch<AddPlan<T>>(p.Di);
  for (int64_t token = tokens.call.token0; token < tokens.call.token0 + tokens.call.tokens; ++token) {
    const int64_t sequence = sequence_of(s, token), first_row = s.cu_seqlens_k[sequence];
    const int64_t low = range - first_row, high = low + kCacheRange;
    const T* index_q = static_cast<const T*>(p.index_q) + token * p.Hi * p.Di;
    if (p.topk_indices == nullptr) {
      const int64_t begin = low < 0 ? 0 : low, end = least(high, visible_keys(s, sequence, token));
      const auto row = [&](int64_t position) { return p.sums + (first_row + position) * p.Di; };
      if (begin < end) add_token(plan, p.Hi, tokens.g(token, 0), begin, end, index_q, p.Di, row);
    } else {
      const int32_t* list = p.topk_indices + token * p.top_k;
      const int64_t n = list_length(list, p.top_k), begin = list_position(list, n, low), end = list_position(list, n, high);
      const auto row = [&](int64_t position) { return p.sums + (first_row + list[position]) * p.Di; };
      if (begin < end) add_token(plan, p.Hi, tokens.g(token, 0), begin, end, index_q, p.Di, row);
    }
  }
}

template <class T>
void kl_store_item(void* context, int64_t item) {
  const IndexerKlBackwardParams& p = *static_cast<const IndexerKlBackwardParams*>(context);
  const int64_t end = least(p.sequences.key_rows, (item + 1) * kCacheRange);
  for (int64_t r = item * kCacheRange; r < end; ++r) store_gradient(p.sums + r * p.Di, p.Di, static_cast<T*>(p.d_index_k) + r * p.Di);
}

template <class T>
void kl_backward_of(const IndexerKlBackwardParams& p) {
  const int64_t T_all = p.sequences.T, rows = p.sequences.key_rows, ranges = (rows + kCacheRange - 1) / kCacheRange;
  std::memset(p.sums, 0, static_cast<size_t>(rows * p.Di) * 4);
  for (int64_t token = 0; token < T_all; token += p.score_tokens) {
    KlTokens tokens{p, {p, token, least(p.score_tokens, T_all - token)}};
    parallel_items(tokens.call.items, tokens.call.work_ns(2), kl_query_gradient_item<T>, &tokens);
    parallel_items(ranges, tokens.call.work_ns(1), kl_key_gradient_item<T>, &tokens);
  }
  parallel_items(ranges, rows * p.Di / 8, kl_store_item<T>, const_cast<IndexerKlBackwardParams*>(&p));
}

inline void kl_backward(const IndexerKlBackwardParams& p) {
  p.dtype == DType::bf16 ? kl_backward_of<uint16_t>(p) : kl_backward_of<float>(p);
}
