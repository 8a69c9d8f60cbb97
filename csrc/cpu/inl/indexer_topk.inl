// indexer_topk: weighted-ReLU scores of the keys that each query token sees, and the exact top_k of them
// Contract   include/glmx/ops.h IndexerTopkParams   Oracle reference/indexer_topk.py   Doc docs/ops/indexer_topk.md
// Shapes     q [T,Hi,Di] | weights [T,Hi] f32 | k [rows,Di] | topk_indices [T,top_k] i32
// Layout     the heads of each token of an item are packed as the rows of tiles (words); keys are packed, a panel of 16 per vector at a
//            time, into L1, and meet all tokens of the item there
// Numerics   a score is the GEMM tree per head, then fp32 fma over the heads in order. Selection is exact in a total order: the best of a
//            whole are the best among the best of its parts, so ranges of keys may be split over threads, X2 and X3 hold by definition
// Algorithm  work item = (block of tokens of a sequence, range of keys). A panel's products with one token stay in L1 until the heads are
//            summed; scores above the token's floor, its k-th best so far, join its candidates, and a full buffer is cut to its k best.
//            Where a block has several ranges, their best wait in the shared scratch, and items over tokens choose among them
// Work/bytes 2*Hi*Di flop per token and key, Di elements per key and block: bound by arithmetic from about 4 heads
// Workspace  per thread: 192 KB of queries (those of one token, if that is more), and at most 2*top_k + 512 candidates of 8 bytes for each
//            token of a block (at most 32). Shared: 48 bytes a block; 8 bytes * top_k for each token and range of split blocks, of which
//            there are at most 8 a thread. Nothing grows with T x S
// Measured   see docs/ops/indexer_topk.md
// Limits     checked in ops/indexer_topk.cpp
#include "cpu/inl/fetch_rows.inl"
#include "cpu/inl/gemm_tile.inl"
#include "cpu/inl/index_score.inl"
#include "cpu/inl/key_rows.inl"
#include "cpu/inl/largest.inl"
#include "cpu/inl/pieces.inl"

constexpr int64_t kQueryFloats = 48 * 1024;  // packed queries of an item: 192 KB leave room in an L2 of 512 KB; 12 tokens of 32 x 128
constexpr int64_t kMostTokens = 32;          // of an item, where heads are few or narrow
constexpr int64_t kListTokens = 64;          // of an item that writes lists of all keys

// The products of the heads of an item's tokens with a panel of keys, by the GEMM tree on the vector unit. Everything else is independent
// of how products are made: a kernel for a matrix unit replaces this struct.
template <class Element>
struct FmaProducts {
  using T = Element;
  struct Session {};                       // alive while an item runs
  static constexpr int64_t kKeys = kCols;  // of a panel; divides kPageRows, so that the keys of a panel lie side by side
  using W = Word<T>;
  int64_t heads, depth;
  W *tiles, *panel;
  FmaProducts(Pieces& pieces, int64_t tokens, int64_t Hi, int64_t Di) : heads(Hi), depth(Di) {
    tiles = pieces.take<W>(tokens * token_words());
    panel = pieces.take<W>(words() * kKeys);
  }
  int64_t words() const { return round_up(depth, 32) / kPerWord<W>; }
  int64_t token_words() const { return round_up(heads, kRows) * words(); }
  W* tile(int64_t i, int64_t h) const { return tiles + i * token_words() + h * words(); }
  void pack_token(int64_t i, const T* q) {
    for (int64_t h = 0; h < heads; h += kRows) {
      pack_tile<T>([&](int64_t row) { return q + (h + row) * depth; }, least(kRows, heads - h), depth, tile(i, h));
    }
  }
  void pack_keys(const T* k, int64_t n) { pack_panel_rows(k, depth, n, depth, panel); }
  int64_t calls() const { return (heads + kRows - 1) / kRows * ((depth + 31) / 32); }  // of `meanwhile` in a product
  // out [heads rounded up to 32][kKeys]
  template <class Meanwhile>
  void multiply(int64_t i, float* out, Meanwhile& meanwhile) const {
    std::memset(out, 0, static_cast<size_t>(heads * kKeys) * 4);
    for (int64_t h = 0; h < heads; h += kRows) {
      tile_times_panel_n<PackedRows<W>>(heads - h, tile(i, h), panel, out + h * kKeys, kKeys, depth, meanwhile);
    }
  }
};

// A score in the order of a selection: -0 becomes +0, NaN -inf.
inline V16 in_selection_order(V16 score) {
  const V16 minus_inf = set1(-__builtin_inff());
  return select_lt(minus_inf, score, add(score, zero()), minus_inf);
}

// The best keys of one token so far, in order of position: fewer than the buffer holds until it is first full, then those above `floor`.
struct Candidates {
  float* score;
  int32_t* key;
  int64_t count, room;  // room: a multiple of 16 that top_k + 16 fits, and 16 of each behind it
  float floor;
  bool open;  // no floor yet
  // Sixteen scores of keys from `at` on, of which the row sees n.
  void offer(V16 scores, int64_t at, int64_t n, int64_t top_k) {
    uint32_t mask = first_bits(n);
    if (!open) mask &= mask_lt(set1(floor), scores);
    if (mask == 0) return;
    if (count + 16 > room) {
      floor = keep_largest(score, key, count, top_k);
      count = top_k;
      open = false;
      mask &= mask_lt(set1(floor), scores);
    }
    alignas(64) float lane[16];
    alignas(64) int32_t number[16];
    store(lane, scores);
    for (int i = 0; i < 16; ++i) number[i] = static_cast<int32_t>(at) + i;
    compress(lane, mask, score + count);
    compress(number, mask, key + count);
    count += __builtin_popcount(mask);
  }
};

// Some query tokens of a sequence, and the work items that they are.
struct TokenBlock {
  int64_t sequence, token, tokens;
  int64_t keys;               // that the last token sees
  int64_t first_item, items;  // ranges of keys; 1 where lists hold all keys
  int64_t first_part;         // of a split block: where its parts begin
  bool all_keys;
};

// A part is what a range of keys leaves of a token: its count and at most `part_keys` candidates.
struct IndexCall {
  const IndexerTopkParams& p;
  TokenBlock* blocks;
  int64_t block_count, items, range_keys, part_keys;
  float* part_score;
  int32_t *part_key, *part_count;
  const TokenBlock& block_of(int64_t item) const {
    int64_t low = 0, high = block_count - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (blocks[middle].first_item <= item) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return blocks[low];
  }
};

template <class Products>
struct IndexPlan {
  Products products;
  float *product, *score;
  int32_t* key;
  Candidates* candidates;
  IndexPlan(Pieces& pieces, const IndexerTopkParams& p, int64_t tokens, int64_t room) : products(pieces, tokens, p.Hi, p.Di) {
    product = pieces.take(round_up(p.Hi, 32) * Products::kKeys);
    score = pieces.take(tokens * (room + 16));
    key = pieces.take<int32_t>(tokens * (room + 16));
    candidates = reinterpret_cast<Candidates*>(pieces.take(tokens * static_cast<int64_t>(sizeof(Candidates) / 4)));
  }
};

// The list of a row: n keys, then -1.
inline void end_list(int32_t* list, int64_t n, int64_t top_k) {
  for (int64_t i = n; i < top_k; ++i) list[i] = -1;
}

template <class Products>
void index_scored_item(const IndexCall& call, const TokenBlock& block, int64_t range) {
  using T = typename Products::T;
  const IndexerTopkParams& p = call.p;
  const int64_t begin = range * call.range_keys, end = least(begin + call.range_keys, block.keys);
  // A buffer of twice top_k is cut at most once for each top_k keys; one of all keys of the range never before its end.
  const int64_t room = round_up(least(end - begin, p.top_k + (p.top_k < 512 ? 512 : p.top_k)), 16);
  auto plan = plan_in_scratch<IndexPlan<Products>>(p, block.tokens, room);
  for (int64_t i = 0; i < block.tokens; ++i) {
    plan.products.pack_token(i, static_cast<const T*>(p.q) + (block.token + i) * p.Hi * p.Di);
    plan.candidates[i] = {plan.score + i * (room + 16), plan.key + i * (room + 16), 0, room, 0.0f, true};
  }
  const int64_t first_seen = block.keys - block.tokens + 1;  // keys that token 0 sees
  const auto keys = [&](int64_t at) { return static_cast<const T*>(p.k) + key_row(p.sequences, block.sequence, at) * p.Di; };
  for (int64_t at = begin, next; at < end; at = next) {
    next = at + Products::kKeys;
    plan.products.pack_keys(keys(at), least(Products::kKeys, end - at));
    const int64_t from = at < first_seen ? 0 : at - first_seen + 1;
    // The next panel's keys lie side by side: they are fetched as one row.
    FetchRows fetch(keys, next, next < end ? next + 1 : next, least(Products::kKeys, end - next) * p.Di * static_cast<int64_t>(sizeof(T)),
                    (block.tokens - from) * plan.products.calls());
    for (int64_t i = from; i < block.tokens; ++i) {
      plan.products.multiply(i, plan.product, fetch);
      const int64_t seen = least(first_seen + i, end) - at;
      V16 scores[Products::kKeys / 16];
      index_scores_of(plan.product, Products::kKeys, p.weights + (block.token + i) * p.Hi, p.Hi, scores);
      for (int64_t j = 0; j < least(Products::kKeys, seen); j += 16) {
        plan.candidates[i].offer(in_selection_order(scores[j / 16]), at + j, seen - j, p.top_k);
      }
    }
  }
  for (int64_t i = 0; i < block.tokens; ++i) {
    Candidates& best = plan.candidates[i];
    if (best.count > p.top_k) {
      keep_largest(best.score, best.key, best.count, p.top_k);
      best.count = p.top_k;
    }
    const size_t bytes = static_cast<size_t>(best.count) * 4;
    if (block.items == 1) {
      std::memcpy(p.topk_indices + (block.token + i) * p.top_k, best.key, bytes);
      continue;
    }
    const int64_t part = block.first_part + i * block.items + range;
    call.part_count[part] = static_cast<int32_t>(best.count);
    std::memcpy(call.part_score + part * call.part_keys, best.score, bytes);
    std::memcpy(call.part_key + part * call.part_keys, best.key, bytes);
  }
}

template <class Products>
void index_item(void* context, int64_t item) {
  const IndexCall& call = *static_cast<const IndexCall*>(context);
  const TokenBlock& block = call.block_of(item);
  if (!block.all_keys) {
    [[maybe_unused]] const typename Products::Session session;
    return index_scored_item<Products>(call, block, item - block.first_item);
  }
  for (int64_t i = 0; i < block.tokens; ++i) {
    int32_t* list = call.p.topk_indices + (block.token + i) * call.p.top_k;
    const int64_t n = block.keys - block.tokens + 1 + i;
    for (int64_t j = 0; j < n; ++j) list[j] = static_cast<int32_t>(j);
    end_list(list, n, call.p.top_k);
  }
}

struct MergePlan {
  float* score;
  int32_t* key;
  MergePlan(Pieces& pieces, int64_t keys) {
    score = pieces.take(keys + 16);
    key = pieces.take<int32_t>(keys + 16);
  }
};

// Item: the `item`-th token of all split blocks. The parts of its ranges, in order, are one list of candidates.
inline void index_merge_item(void* context, int64_t item) {
  const IndexCall& call = *static_cast<const IndexCall*>(context);
  const TokenBlock* block = call.blocks;
  for (;; ++block) {
    if (block->items == 1) continue;
    if (item < block->tokens) break;
    item -= block->tokens;
  }
  const auto plan = plan_in_scratch<MergePlan>(block->items * call.part_keys);
  int64_t n = 0;
  for (int64_t part = block->first_part + item * block->items, last = part + block->items; part < last; ++part) {
    const size_t bytes = static_cast<size_t>(call.part_count[part]) * 4;
    std::memcpy(plan.score + n, call.part_score + part * call.part_keys, bytes);
    std::memcpy(plan.key + n, call.part_key + part * call.part_keys, bytes);
    n += call.part_count[part];
  }
  keep_largest(plan.score, plan.key, n, call.p.top_k);
  std::memcpy(call.p.topk_indices + (block->token + item) * call.p.top_k, plan.key, static_cast<size_t>(call.p.top_k) * 4);
}

// body(block) for all blocks of a call: of each sequence first the tokens that see at most top_k keys, then the others, evened out.
template <class Body>
inline void each_block(const IndexerTopkParams& p, Body body) {
  const int64_t most = kQueryFloats / (round_up(p.Hi, kRows) * round_up(p.Di, 32)), most_scored = most < 1 ? 1 : least(most, kMostTokens);
  const Sequences& s = p.sequences;
  for (int64_t i = 0; i < s.B; ++i) {
    const int64_t end = s.cu_seqlens_q[i + 1];
    int64_t token = s.cu_seqlens_q[i];
    const int64_t scored = least(end, token + (p.top_k < visible_keys(s, i, token) ? 0 : p.top_k - visible_keys(s, i, token) + 1));
    const auto cut = [&](int64_t last, int64_t tokens, bool all_keys) {
      while (token < last) {
        const int64_t n = least(tokens, last - token);
        body(TokenBlock{i, token, n, visible_keys(s, i, token + n - 1), 0, 1, 0, all_keys});
        token += n;
      }
    };
    cut(scored, kListTokens, true);
    const int64_t blocks = (end - scored + most_scored - 1) / most_scored;
    if (blocks > 0) cut(end, (end - scored + blocks - 1) / blocks, false);
  }
}

template <class Products>
void index_forward_of(const IndexerTopkParams& p) {
  IndexCall call{p, nullptr, 0, 0, p.range_keys, 0, nullptr, nullptr, nullptr};
  int64_t keys = 0, pairs = 0;
  each_block(p, [&](const TokenBlock& block) {
    ++call.block_count;
    keys += block.all_keys ? 0 : block.keys;
    pairs += block.all_keys ? 0 : block.keys * block.tokens;
  });
  const int64_t work_ns = pairs * p.Hi * p.Di / 25 + p.sequences.T * p.top_k / 8;  // at about 50 GFLOP/s a core
  if (call.range_keys == 0) {
    // Few blocks, as of a decode step, are split over ranges of keys until each thread has two items: each begins without a floor.
    const int64_t threads = work_ns < kSmallWorkNs ? 1 : parallel_threads();
    call.range_keys = round_up(threads == 1 ? keys + 1 : keys / (2 * threads) + 1, kPageRows);
  }
  call.part_keys = least(p.top_k, call.range_keys);
  int64_t parts = 0, split_tokens = 0;
  const auto place = [&](TokenBlock block) {
    block.items = block.all_keys ? 1 : (block.keys + call.range_keys - 1) / call.range_keys;
    block.first_item = call.items;
    block.first_part = parts;
    call.items += block.items;
    if (block.items > 1) parts += block.items * block.tokens, split_tokens += block.tokens;
    return block;
  };
  each_block(p, place);
  const int64_t block_bytes = round_up(call.block_count * static_cast<int64_t>(sizeof(TokenBlock)), 64);
  call.blocks = static_cast<TokenBlock*>(thread_scratch(Scratch::shared, block_bytes + parts * (2 * call.part_keys + 1) * 4));
  call.part_score = reinterpret_cast<float*>(call.blocks) + block_bytes / 4;
  call.part_key = reinterpret_cast<int32_t*>(call.part_score) + parts * call.part_keys;
  call.part_count = call.part_key + parts * call.part_keys;
  call.block_count = call.items = parts = split_tokens = 0;
  each_block(p, [&](const TokenBlock& block) { call.blocks[call.block_count++] = place(block); });
  parallel_items(call.items, work_ns, index_item<Products>, &call);
  parallel_items(split_tokens, parts * call.part_keys * 10, index_merge_item, &call);
}

inline void index_forward(const IndexerTopkParams& p) {
  p.dtype == DType::bf16 ? index_forward_of<FmaProducts<uint16_t>>(p) : index_forward_of<FmaProducts<float>>(p);
}
