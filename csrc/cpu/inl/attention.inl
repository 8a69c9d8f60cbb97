// attention: causal softmax(q k^T * scale) v over each sequence's own keys, several query tokens per sequence; its gradients
// Contract   include/glmx/ops.h AttentionParams   Oracle reference/attention.py   Doc docs/ops/attention.md
// Shapes     q [T,A,Dk] | k [rows,G,Dk] | v [rows,G,Dv], or the first Dv of k | out [T,A,Dv] | lse [T,A] f32
// Layout     the A/G heads of a kv head's tokens are packed as the rows of tiles (words); keys are packed, block by block, into panels
//            that stay in L1 (16 per panel and vector); values are widened on their way into panels, which in fp32 the first tile of
//            rows leaves behind for the others. One tile of rows packs no keys
// Numerics   ops.h, "Attention". A row multiplies no key that it does not see, so a NaN in a later token stays there; X2 and X3 hold
//            because a row's operations follow from its own sequence and position alone
// Algorithm  work item = (sequence, kv head, block of query rows), or several kv heads of few rows: a block of 64 keys meets all of them,
//            while the next one is fetched line by line; scores, sums and accumulators stay in L2. Backward: delta of every row; dq by the
//            same items; dk and dv by items of (sequence, kv head, block of keys), which walk the query rows in order
// Work/bytes forward 2*A*(Dk + Dv) flop per visible key, G*(Dk + Dv) elements; backward twice the products of scores, 5 more
// Measured   see docs/ops/attention.md
// Limits     checked in ops/attention.cpp
#include "cpu/inl/attend.inl"
#include "cpu/inl/key_rows.inl"

// Rows of an item: queries and accumulators of 80K floats (320 KB) leave room in an L2 of 512 KB; beyond 192 rows packing keys is free.
constexpr int64_t kItemFloats = 80 * 1024, kItemRows = 192;
// Of a block of keys of an item's kv heads. Items of fewer heads come to each page more often: those of two take 1.3 times as long at
// 32,768 keys (fp32, 8 heads of 128 values, one thread).
constexpr int64_t kItemKeyBytes = 512 * 1024;

template <class T>
struct CachedKeys {
  static constexpr int64_t kGathered = 0;
  const Sequences& s;
  int64_t sequence;
  const T *k, *v;
  int64_t k_stride, v_stride;
  int64_t Dk, Dv;
  const T* row(int64_t key, bool value) const {
    const int64_t at = key_row(s, sequence, key);
    return value ? v + at * v_stride : k + at * k_stride;
  }
  CachedKeys group(int64_t g) const { return {s, sequence, k + g * Dk, v + g * Dv, k_stride, v_stride, Dk, Dv}; }
  KeyBlock<T> block(int64_t first, int64_t, T*) const { return {row(first, false), row(first, true), k_stride, v_stride}; }
  // Keys [first, first + n) of `all`, or their values: row_bytes of each, from this kv head on.
  FetchBlock fetch(bool v, int64_t first, int64_t n, int64_t all, int64_t row_bytes, int64_t calls) const {
    if (n == 0) return {nullptr, 0, 0, row_bytes, 0, calls};
    const int64_t size = sizeof(T), later = first + kBlockKeys < all ? (row(first + kBlockKeys, v) - row(first, v)) * size : 0;
    return {row(first, v), (v ? v_stride : k_stride) * size, n, row_bytes, later, calls};
  }
};

// Params is AttentionParams or AttentionBackwardParams.
template <class T, class Params>
inline CachedKeys<T> keys_of(const Params& p, int64_t sequence, int64_t group) {
  const T* k = static_cast<const T*>(p.k) + group * p.Dk;
  if (p.v == nullptr) return {p.sequences, sequence, k, k, p.G * p.Dk, p.G * p.Dk, p.Dk, p.Dk};
  return {p.sequences, sequence, k, static_cast<const T*>(p.v) + group * p.Dv, p.G * p.Dk, p.G * p.Dv, p.Dk, p.Dv};
}

// All query rows of a sequence and kv head.
template <class Params>
inline QueryRows rows_of(const Params& p, int64_t sequence, int64_t group) {
  const Sequences& s = p.sequences;
  const int64_t heads = p.A / p.G, token = s.cu_seqlens_q[sequence];
  return {token, group * heads, heads, p.A, 0, (s.cu_seqlens_q[sequence + 1] - token) * heads, visible_keys(s, sequence, token)};
}

// A call and how it is cut into items. Which rows share an item changes no bits.
template <class Unit, class Params>
struct Call {
  static constexpr int64_t kTileRows = Unit::kTileRows;
  const Params& p;
  int64_t block_rows, groups, items;  // groups: kv heads of an item
  int64_t blocks(int64_t sequence) const { return (rows_of(p, sequence, 0).count + block_rows - 1) / block_rows; }
  int64_t spans() const { return (p.G + groups - 1) / groups; }
  // All items on one core at about 50 GFLOP/s: `products` times 2 * Dk or Dv flop for each query row and key.
  int64_t work_ns(int64_t products) const {
    int64_t pairs = 0;
    for (int64_t i = 0; i < p.sequences.B; ++i) {
      pairs += int64_t{p.sequences.cu_seqlens_q[i + 1] - p.sequences.cu_seqlens_q[i]} * p.sequences.seq_lens[i];
    }
    return pairs * p.A * (p.Dk + p.Dv) * products / 50;
  }
  void count_items() {
    items = 0;
    for (int64_t i = 0; i < p.sequences.B; ++i) items += spans() * blocks(i);
  }
  Call(const Params& params, int64_t most_groups)
      : p(params), block_rows(round_up(least(kItemRows, kItemFloats / (p.Dk + p.Dv) + 1), kTileRows)), groups(1), items(0) {
    // A decode step has few rows: their heads are split over items until each thread has two.
    const int64_t threads = work_ns(2) < kSmallWorkNs ? 1 : parallel_threads(), wanted = threads == 1 ? 1 : 2 * threads;
    for (count_items(); items < wanted && block_rows > kTileRows; count_items()) block_rows = round_up(block_rows / 2, kTileRows);
    // Or so few that an item has room for several kv heads: their keys lie side by side, and are read as one stream.
    for (int64_t i = 0; i < p.sequences.B; ++i) most_groups = least(most_groups, block_rows / (rows_of(p, i, 0).count + 1));
    most_groups = least(most_groups, kItemKeyBytes / (kBlockKeys * (p.Dk + p.Dv) * dtype_size(p.dtype)));
    while (2 * groups <= most_groups && items / 2 >= threads) {
      groups *= 2;
      count_items();
    }
  }
  // Late rows see the most keys: they come first, so that no thread is left with them at the end.
  // body(sequence, kv head, kv heads, rows of the first of them)
  template <class Body>
  void at(int64_t item, Body body) const {
    item = items - 1 - item;
    for (int64_t i = 0; i < p.sequences.B; ++i) {
      const int64_t n = spans() * blocks(i);
      if (item >= n) {
        item -= n;
        continue;
      }
      const int64_t group = item % spans() * groups, block = item / spans();
      QueryRows rows = rows_of(p, i, group);
      const int64_t even = round_up((rows.count + blocks(i) - 1) / blocks(i), kTileRows);  // 64 rows are not 63 and 1
      rows.first = block * even;
      rows.count = least(even, rows.count - rows.first);
      return body(i, group, least(groups, p.G - group), rows);
    }
  }
};

template <class Unit, class T = typename Unit::T>
void forward_item(void* context, int64_t item) {
  const auto& call = *static_cast<const Call<Unit, AttentionParams>*>(context);
  const AttentionParams& p = call.p;
  [[maybe_unused]] const typename Unit::Session session;
  call.at(item, [&](int64_t sequence, int64_t group, int64_t groups, const QueryRows& rows) {
    attend<Unit>(rows, keys_of<T>(p, sequence, group), groups, {p.Dk, p.Dv, p.scale}, static_cast<const T*>(p.q), static_cast<T*>(p.out),
                 p.lse);
  });
}

template <class Unit>
void forward_of(const AttentionParams& p) {
  Call<Unit, AttentionParams> call(p, p.G);
  parallel_items(call.items, call.work_ns(2), forward_item<Unit>, &call);
}

inline void attention_forward(const AttentionParams& p) {
  p.dtype == DType::bf16 ? forward_of<FmaUnit<uint16_t>>(p) : forward_of<FmaUnit<float>>(p);
}

template <class T>
void delta_item(void* context, int64_t item) {
  const AttentionBackwardParams& p = *static_cast<const AttentionBackwardParams*>(context);
  const int64_t end = least(p.sequences.T * p.A, (item + 1) * kBlockKeys);
  for (int64_t r = item * kBlockKeys; r < end; ++r) {
    p.delta[r] = gradient_delta(static_cast<const T*>(p.d_out) + r * p.Dv, static_cast<const T*>(p.out) + r * p.Dv, p.Dv);
  }
}

template <class T>
inline AttendGradient<T> gradient_of(const AttentionBackwardParams& p) {
  return {static_cast<const T*>(p.q), static_cast<const T*>(p.d_out), p.lse, p.delta};
}

struct NoSink {
  void block(int64_t, int64_t, const float*, const float*) const {}
};

template <class Unit, class T = typename Unit::T>
void query_gradient_item(void* context, int64_t item) {
  const auto& call = *static_cast<const Call<Unit, AttentionBackwardParams>*>(context);
  const AttentionBackwardParams& p = call.p;
  [[maybe_unused]] const typename Unit::Session session;
  call.at(item, [&](int64_t sequence, int64_t group, int64_t, const QueryRows& rows) {
    attend_query_gradient<Unit>(rows, keys_of<T>(p, sequence, group), {p.Dk, p.Dv, p.scale}, gradient_of<T>(p), static_cast<T*>(p.d_q),
                                NoSink{});
  });
}

constexpr int64_t kChunkRows = 64;  // query rows at a time under a block of keys: two blocks of 32 of the tree

template <class T>
struct KeyGradientPlan {
  using W = Word<T>;
  W *k, *v, *q, *d_out, *panel, *room;
  float *s, *dp, *d_k, *d_v;
  int64_t k_words, v_words, k_ld, v_ld;
  KeyGradientPlan(Pieces& pieces, int64_t Dk, int64_t Dv, bool shared)
      : k_words(row_words<T>(Dk)), v_words(row_words<T>(Dv)), k_ld(round_up(Dk, kCols)), v_ld(round_up(Dv, kCols)) {
    k = pieces.take<W>(kBlockKeys * k_words);
    v = shared ? k : pieces.take<W>(kBlockKeys * v_words);
    q = pieces.take<W>(round_up(kChunkRows, kRows) * k_words);
    d_out = pieces.take<W>(round_up(kChunkRows, kRows) * v_words);
    s = pieces.take(round_up(kChunkRows, kRows) * kBlockKeys);
    dp = pieces.take(round_up(kChunkRows, kRows) * kBlockKeys);
    d_k = pieces.take((kBlockKeys + kRows) * k_ld);
    d_v = pieces.take((kBlockKeys + kRows) * v_ld);
    panel = pieces.take<W>(kChunkRows * kCols);
    room = pieces.take<W>(weight_room<W>(kChunkRows));
  }
};

// All panels of a block of keys: panel j holds keys [j * kCols, ...), [words][kCols].
template <class T>
inline void pack_key_panels(const T* keys, int64_t stride, int64_t n, int64_t D, Word<T>* panels) {
  for (int64_t j = 0; j < n; j += kCols) pack_panel_rows(keys + j * stride, stride, least(kCols, n - j), D, panels + j * row_words<T>(D));
}

// out[i][key] = tile row i . key, for packed panels of `words` rows each.
template <class T, class W = Word<T>>
inline void tiles_times_panels(const W* tiles, int64_t rows, int64_t D, const W* panels, int64_t words, int64_t n, float* out) {
  std::memset(out, 0, static_cast<size_t>(rows * kBlockKeys) * 4);
  for (int64_t j = 0; j < n; j += kCols) {
    for (int64_t k = 0; k < D; k += kDepth<W>) {
      for (int64_t i = 0; i < rows; i += kRows) {
        tile_times_panel_n<PackedRows<W>>(rows - i, tiles + i * row_words<T>(D) + k / kPerWord<W> * kRows,
                                          panels + j * words + k / kPerWord<W> * kCols, out + i * kBlockKeys + j, kBlockKeys,
                                          least(kDepth<W>, D - k));
      }
    }
  }
}

// acc[key] += the sum over rows of p[row][key] * matrix[row].
template <class T>
inline void keys_times_queries(const float* p, const QueryRows& rows, const T* matrix, int64_t D, int64_t n, Word<T>* room, Word<T>* panel,
                               float* acc, int64_t ld) {
  const Word<T>* weights = key_words(p, rows.count, kBlockKeys, room);
  for (int64_t j = 0; j < D; j += kCols) {
    pack_panel_columns<T>([&](int64_t r) { return matrix + rows.at(r) * D + j; }, least(kCols, D - j), rows.count, panel);
    for (int64_t key = 0; key < n; key += kRows) {
      tile_times_panel_n<KeyTile<Word<T>>>(n - key, weights + key, panel, acc + key * ld + j, ld, rows.count);
    }
  }
}

template <class T>
void key_gradient(const AttentionBackwardParams& p, int64_t sequence, int64_t group, int64_t first, int64_t n) {
  const bool shared = p.v == nullptr;
  const auto plan = plan_in_scratch<KeyGradientPlan<T>>(p.Dk, p.Dv, shared);
  const CachedKeys<T> keys = keys_of<T>(p, sequence, group);
  const KeyBlock<T> block = keys.block(first, n, nullptr);
  const AttendGradient<T> in = gradient_of<T>(p);
  pack_key_panels(block.k, block.k_stride, n, p.Dk, plan.k);
  if (!shared) pack_key_panels(block.v, block.v_stride, n, p.Dv, plan.v);
  std::memset(plan.d_k, 0, static_cast<size_t>(n * plan.k_ld) * 4);
  std::memset(plan.d_v, 0, static_cast<size_t>(n * plan.v_ld) * 4);

  const QueryRows all = rows_of(p, sequence, group);
  const int64_t blind = first < all.keys ? 0 : (first - all.keys + 1) * all.heads;  // rows before it see none of these keys
  QueryRows rows = all;
  for (rows.first = blind / 32 * 32; rows.first < all.count; rows.first += kChunkRows) {
    rows.count = least(kChunkRows, all.count - rows.first);
    pack_query_tiles(rows, in.q, p.Dk, plan.q);
    pack_query_tiles(rows, in.d_out, p.Dv, plan.d_out);
    tiles_times_panels<T>(plan.q, rows.count, p.Dk, plan.k, plan.k_words, n, plan.s);
    tiles_times_panels<T>(plan.d_out, rows.count, p.Dv, plan.v, shared ? plan.k_words : plan.v_words, n, plan.dp);
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t at = rows.at(i), left = rows.seen(i) - first;
      const int32_t seen = static_cast<int32_t>(left < 0 ? 0 : least(left, n));
      score_gradient<T>(plan.s + i * kBlockKeys, plan.dp + i * kBlockKeys, seen, p.scale, in.lse[at], in.delta[at]);
    }
    keys_times_queries(plan.s, rows, in.d_out, p.Dv, n, plan.room, plan.panel, plan.d_v, plan.v_ld);
    keys_times_queries(plan.dp, rows, in.q, p.Dk, n, plan.room, plan.panel, plan.d_k, plan.k_ld);
  }

  const int64_t row = p.sequences.cu_seqlens_k[sequence] + first;
  for (int64_t key = 0; key < n; ++key) {
    float *d_k = plan.d_k + key * plan.k_ld, *d_v = plan.d_v + key * plan.v_ld;
    if (shared) {  // the columns past Dv are keys alone
      for (int64_t j = 0; j < p.Dv; j += 16) store_n(d_k + j, add(load(d_k + j), load(d_v + j)), lanes(p.Dv - j));
    } else {
      store_gradient(d_v, p.Dv, static_cast<T*>(p.d_v) + ((row + key) * p.G + group) * p.Dv);
    }
    store_gradient(d_k, p.Dk, static_cast<T*>(p.d_k) + ((row + key) * p.G + group) * p.Dk);
  }
}

// Rows that belong to no sequence have no gradient.
inline void zero_rows_between(const AttentionBackwardParams& p, int64_t begin, int64_t end) {
  const int64_t size = p.dtype == DType::bf16 ? 2 : 4;
  const auto clear = [&](void* matrix, int64_t width) {
    std::memset(static_cast<char*>(matrix) + begin * width * size, 0, static_cast<size_t>((end - begin) * width * size));
  };
  clear(p.d_k, p.G * p.Dk);
  if (p.v != nullptr) clear(p.d_v, p.G * p.Dv);
}

template <class T>
void key_gradient_item(void* context, int64_t item) {
  const AttentionBackwardParams& p = *static_cast<const AttentionBackwardParams*>(context);
  const Sequences& s = p.sequences;
  if (item == 0) {
    zero_rows_between(p, 0, s.cu_seqlens_k[0]);
    for (int64_t i = 0; i < s.B; ++i) zero_rows_between(p, s.cu_seqlens_k[i] + s.seq_lens[i], s.cu_seqlens_k[i + 1]);
    return zero_rows_between(p, s.cu_seqlens_k[s.B], s.key_rows);
  }
  --item;
  for (int64_t i = 0; i < s.B; ++i) {
    const int64_t n = p.G * ((s.seq_lens[i] + kBlockKeys - 1) / kBlockKeys);
    if (item < n) {
      const int64_t first = item / p.G * kBlockKeys;
      return key_gradient<T>(p, i, item % p.G, first, least(kBlockKeys, s.seq_lens[i] - first));
    }
    item -= n;
  }
}

template <class Unit, class T = typename Unit::T>
void backward_of(const AttentionBackwardParams& p) {
  void* context = const_cast<AttentionBackwardParams*>(&p);
  parallel_items((p.sequences.T * p.A + kBlockKeys - 1) / kBlockKeys, p.sequences.T * p.A * p.Dv / 8, delta_item<T>, context);
  Call<Unit, AttentionBackwardParams> call(p, 1);
  parallel_items(call.items, call.work_ns(3), query_gradient_item<Unit>, &call);
  int64_t items = 1;
  for (int64_t i = 0; i < p.sequences.B; ++i) items += p.G * ((p.sequences.seq_lens[i] + kBlockKeys - 1) / kBlockKeys);
  parallel_items(items, call.work_ns(4), key_gradient_item<T>, context);
}

inline void attention_gradients(const AttentionBackwardParams& p) {
  p.dtype == DType::bf16 ? backward_of<FmaUnit<uint16_t>>(p) : backward_of<FmaUnit<float>>(p);
}
