// Query rows that share one list of keys: their attention to it, and its gradients. What attention and sparse_mla are made of.
// Included after vec.h, vec64.h and transpose.h, inside their anonymous namespace; numerics as ops.h says under "Attention".
#pragma once
#include "cpu/inl/fetch_rows.inl"
#include "cpu/inl/gemm_tile.inl"
#include "cpu/inl/math64.inl"
#include "cpu/inl/pieces.inl"
#include "cpu/inl/rows.inl"
#include "cpu/inl/vec_math.inl"

// Where a tile's words are in a block of weights, as weight_words and key_words leave it: a tile row is a query row, or a key.
template <class W>
struct QueryTile {  // [query rows][kBlockKeys / kPerWord]
  static constexpr int row = static_cast<int>(kBlockKeys) / kPerWord<W>, depth = 1, block = kBlockWords<W>;
};
template <class W>
struct KeyTile {  // [words][kBlockKeys]
  static constexpr int row = 1, depth = static_cast<int>(kBlockKeys), block = kBlockWords<W> * static_cast<int>(kBlockKeys);
};

// Weights p [rows][kBlockKeys], rounded to the operands' dtype, as words of depth over the keys, or over the rows. Words of fp32 are the
// weights themselves; others are packed into `room`.
inline const float* weight_words(const float* p, int64_t, float*) { return p; }
inline const float* key_words(const float* p, int64_t, int64_t, float*) { return p; }
template <class W>
inline int64_t weight_room(int64_t rows) {
  return kPerWord<W> == 1 ? 0 : round_up(rows, 4) * kBlockKeys / kPerWord<W>;
}

// Query rows [first, first + count) of a list that holds, from `token` on, `heads` heads of each token, from head `head` on.
// Each token sees one key more than the token before it.
struct QueryRows {
  int64_t token, head, heads, all_heads;
  int64_t first, count;
  int64_t keys;  // of `token`
  int64_t at(int64_t i) const {
    const int64_t r = first + i;
    return (token + r / heads) * all_heads + head + r % heads;
  }
  int64_t seen(int64_t i) const { return keys + (first + i) / heads; }
  // The rows of the g-th kv head after this one.
  QueryRows group(int64_t g) const { return {token, head + g * heads, heads, all_heads, first, count, keys}; }
};

// Some keys of a list and their values, each a row of Dk or Dv elements.
template <class T>
struct KeyBlock {
  const T *k, *v;
  int64_t k_stride, v_stride;
};

struct AttendShape {
  int64_t Dk, Dv;
  float scale;
};

// Words of a packed row of D elements.
template <class T>
inline int64_t row_words(int64_t D) {
  return round_up(D, 32) / kPerWord<Word<T>>;
}

template <class T>
inline void pack_query_tiles(const QueryRows& rows, const T* matrix, int64_t D, Word<T>* tiles) {
  for (int64_t i = 0; i < rows.count; i += kRows) {
    pack_tile<T>([&](int64_t r) { return matrix + rows.at(i + r) * D; }, least(kRows, rows.count - i), D, tiles + i * row_words<T>(D));
  }
}

// out[i][key] = query row i . key, for rows [from, rows), `from` at the start of a tile.
template <class T, class Meanwhile = const Nothing>
inline void queries_times_keys(const Word<T>* tiles, int64_t from, int64_t rows, const T* keys, int64_t stride, int64_t n, int64_t D,
                               Word<T>* panel, float* out, Meanwhile&& meanwhile = {}) {
  using W = Word<T>;
  std::memset(out + from * kBlockKeys, 0, static_cast<size_t>((rows - from) * kBlockKeys) * 4);
  for (int64_t j = 0; j < n; j += kCols) {
    for (int64_t k = 0; k < D; k += kDepth<W>) {
      const int64_t now = least(kDepth<W>, D - k);
      pack_panel_rows(keys + j * stride + k, stride, least(kCols, n - j), now, panel);
      for (int64_t i = from; i < rows; i += kRows) {
        tile_times_panel_n<PackedRows<W>>(rows - i, tiles + i * row_words<T>(D) + k / kPerWord<W> * kRows, panel, out + i * kBlockKeys + j,
                                          kBlockKeys, now, meanwhile);
      }
    }
  }
}

constexpr int64_t kValueCols = 128;  // of values that are packed at a time, a row after the other: rows may lie a power of two apart
constexpr int64_t kPanelWords = kBlockKeys * kValueCols;  // one buffer for the panels of all products of an item: it stays in L1

// n rows of `cols` values -> panels [kCols] of n rows each.
template <class T>
inline void pack_values(const T* values, int64_t stride, int64_t n, int64_t cols, float* panels) {
  for (int64_t key = 0; key < n; ++key) {
    const T* from = values + key * stride;
    float* out = panels + key * kCols;
    for (int64_t j = 0; j < cols; j += kCols, out += n * kCols) {
      for (int64_t i = 0; i < kCols; i += 16) {
        const int64_t left = cols - j - i;
        store(out + i, left >= 16 ? load(from + j + i) : left > 0 ? load_n(from + j + i, lanes(left)) : zero());
      }
    }
  }
}

// A tile of rows that see the first `seen` of a panel's n values @ those. Words of fp32 end where the last value that is seen does.
template <class Meanwhile>
inline void times_seen(int64_t rows, const float* weights, const float* panel, float* acc, int64_t ld, int64_t seen, int64_t,
                       Meanwhile&& meanwhile) {
  tile_times_panel_n<QueryTile<float>>(rows, weights, panel, acc, ld, seen, meanwhile);
}

// Columns of values as they lie, for a tile that comes first: it leaves them packed for the others.
template <class T>
struct ValueColumns {
  const T* at;
  int64_t stride;
  float* panel;
  [[gnu::always_inline]] void word(int k, V16 (&out)[kVecs]) const {
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) store(panel + k * kCols + 16 * j, out[j] = load(at + k * stride + 16 * j));
  }
  void down(int n) {
    at += n * stride;
    panel += n * kCols;
  }
};

// acc[i] += p[i] @ rows of `values`, for rows [from, rows): row i takes its first seen[i] keys and touches no other.
// room: words for weights that must be packed, [rows][kBlockKeys / kPerWord].
template <class T, class Meanwhile = const Nothing>
inline void queries_times_values(const float* p, const int32_t* seen, int64_t from, int64_t rows, const T* values, int64_t stride,
                                 int64_t n, int64_t D, Word<T>* room, Word<T>* panels, float* acc, int64_t ld, Meanwhile&& meanwhile = {}) {
  using W = Word<T>;
  const W* weights = weight_words(p + from * kBlockKeys, rows - from, room);
  const auto times_panel = [&](int64_t first, int64_t j, const W* panel) {
    for (int64_t i = first, end; i < rows; i = end) {
      for (end = i + 1; end < least(rows, i + kRows) && seen[end] == seen[i];) ++end;
      times_seen(end - i, weights + (i - from) * QueryTile<W>::row, panel, acc + i * ld + j, ld, seen[i], n, meanwhile);
    }
  };
  if constexpr (kPerWord<W> == 1) {
    if (D % kCols == 0 && rows - from >= kRows && seen[from] == n) {  // later rows see no less than earlier ones
      for (int64_t j = 0; j < D; j += kCols) {
        tile_times_columns<kRows, QueryTile<W>>(weights, ValueColumns<T>{values + j, stride, panels}, acc + from * ld + j, ld, n,
                                                meanwhile);
        times_panel(from + kRows, j, panels);
      }
      return;
    }
  }
  for (int64_t first = 0; first < D; first += kValueCols) {
    const int64_t cols = least(kValueCols, D - first);
    pack_values(values + first, stride, n, cols, panels);
    for (int64_t j = 0; j < cols; j += kCols) times_panel(from, first + j, panels + j * words_of<W>(n));
  }
}

// How an item's products are made: by the GEMM tree on the vector unit. Everything else is independent of it: a kernel for a matrix unit
// replaces this struct.
template <class Element>
struct VectorUnit {
  using T = Element;
  static constexpr int64_t kTileRows = kRows;  // query rows that are multiplied together
  struct Session {};                           // alive while an item runs

  // Query rows of D elements, packed.
  struct Queries {
    int64_t D;
    Word<T>*tiles, *panel;
    Queries(Pieces& pieces, int64_t rows, int64_t depth, float* shared)
        : D(depth), tiles(pieces.take<Word<T>>(round_up(rows, kRows) * row_words<T>(D))), panel(reinterpret_cast<Word<T>*>(shared)) {}
    void pack(const QueryRows& rows, const T* matrix) const { pack_query_tiles(rows, matrix, D, tiles); }
    // out[i][key] = row i . key for rows [from, rows), `from` at the start of a tile.
    template <class Meanwhile = const Nothing>
    void times_keys(int64_t from, int64_t rows, const T* keys, int64_t stride, int64_t n, float* out, Meanwhile&& meanwhile = {}) const {
      queries_times_keys(tiles, from, rows, keys, stride, n, D, panel, out, meanwhile);
    }
  };

  // Sums of weighted rows of D elements: acc [rows][ld].
  struct Sums {
    int64_t D, ld;
    float* acc;
    Word<T>*panel, *room;
    Sums(Pieces& pieces, int64_t rows, int64_t width, float* shared)
        : D(width),
          ld(round_up(D, kCols)),
          acc(pieces.take(rows * ld)),
          panel(reinterpret_cast<Word<T>*>(shared)),
          room(pieces.take<Word<T>>(weight_room<Word<T>>(rows))) {}
    // acc[i] += p[i] @ rows of `values`, for rows [from, rows): row i takes its first seen[i] values and touches no other.
    template <class Meanwhile = const Nothing>
    void add(const float* p, const int32_t* seen, int64_t from, int64_t rows, const T* values, int64_t stride, int64_t n,
             Meanwhile&& meanwhile = {}) const {
      queries_times_values(p, seen, from, rows, values, stride, n, D, room, panel, acc, ld, meanwhile);
    }
  };
};

// How many keys of a block [first, first + n) each row sees. Returns the first row that sees any, at the start of its tile.
inline int64_t count_seen(const QueryRows& rows, int64_t first, int64_t n, int64_t tile_rows, int32_t* seen) {
  int64_t blind = 0;
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t left = rows.seen(i) - first;
    seen[i] = static_cast<int32_t>(left < 0 ? 0 : least(left, n));
    if (seen[i] == 0) blind = i + 1;
  }
  return blind / tile_rows * tile_rows;
}

// Lane i of vector `at` of a row: does the row see that key ? yes : no.
inline V16 if_seen(int32_t seen, int64_t at, V16 yes, V16 no) {
  if (at + 16 <= seen) return yes;
  alignas(64) const float lane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return select_lt(load(lane), set1(static_cast<float>(seen - at)), yes, no);
}

template <class Unit>
struct ForwardPlan {
  typename Unit::Queries queries;
  typename Unit::Sums sums;
  float* scores;
  float *max, *next, *alpha, *sum, *total;  // per row
  int32_t* seen;
  typename Unit::T* gathered;
  ForwardPlan(Pieces& pieces, int64_t rows, const AttendShape& shape, int64_t gathered_rows, float* panel)
      : queries(pieces, rows, shape.Dk, panel), sums(pieces, rows, shape.Dv, panel) {
    scores = pieces.take(round_up(rows, Unit::kTileRows) * kBlockKeys);
    max = pieces.take(rows);
    next = pieces.take(rows);
    alpha = pieces.take(rows);
    sum = pieces.take(rows);
    total = pieces.take(rows);
    seen = pieces.take<int32_t>(rows);
    gathered = reinterpret_cast<typename Unit::T*>(pieces.take(gathered_rows * shape.Dk));
  }
};

// Those of the kv heads of an item, which share a panel.
template <class Unit>
struct ForwardPlans {
  int64_t rows, gathered_rows, size;
  const AttendShape& shape;
  float *panel, *first;
  ForwardPlans(Pieces& pieces, int64_t groups, int64_t row_count, const AttendShape& attend_shape, int64_t gathered)
      : rows(row_count), gathered_rows(gathered), shape(attend_shape), panel(pieces.take(kPanelWords)) {
    Pieces one{nullptr};
    [[maybe_unused]] const ForwardPlan<Unit> counted(one, rows, shape, gathered_rows, nullptr);
    size = one.used;
    first = pieces.take(groups * size);
  }
  ForwardPlan<Unit> group(int64_t g) const {
    Pieces pieces{first + g * size};
    return {pieces, rows, shape, gathered_rows, panel};
  }
};

// One step of the online softmax: scores become probabilities against the new maximum; alpha is what the past is worth now.
template <class Unit>
inline void softmax_step(const ForwardPlan<Unit>& plan, int64_t from, int64_t rows, float scale) {
  const V16 minus_inf = set1(-__builtin_inff());
  for (int64_t i = 0; i < rows; ++i) {
    plan.next[i] = plan.max[i];
    plan.sum[i] = 0.0f;
    if (i < from || plan.seen[i] == 0) continue;
    float* s = plan.scores + i * kBlockKeys;
    V16 high = minus_inf;
    for (int64_t j = 0; j < kBlockKeys; j += 16) {
      const V16 x = if_seen(plan.seen[i], j, mul(load(s + j), set1(scale)), minus_inf);
      store(s + j, x);
      high = max(high, x);
    }
    const float block_max = fold_max(high);
    if (plan.max[i] < block_max) plan.next[i] = block_max;
  }
  for (int64_t i = 0; i < rows; i += 16) {
    const V16 next = load(plan.next + i);
    const V16 base = select_lt(minus_inf, next, next, zero());  // a maximum of -inf counts as 0: -inf - -inf would be NaN
    store(plan.alpha + i, exp16_below_88(sub(load(plan.max + i), base)));
    store(plan.max + i, next);
    store(plan.next + i, base);
  }
  for (int64_t i = from; i < rows; ++i) {
    if (plan.seen[i] == 0) continue;
    float* s = plan.scores + i * kBlockKeys;
    const V16 base = set1(plan.next[i]);
    V16 sum = zero();
    for (int64_t j = 0; j < kBlockKeys; j += 16) {
      const V16 p = exp16_below_88(sub(load(s + j), base));
      sum = add(sum, p);
      store(s + j, round_to(p, static_cast<const typename Unit::T*>(nullptr)));
    }
    plan.sum[i] = fold_add(sum);
  }
  for (int64_t i = 0; i < rows; i += 16) {
    store(plan.total + i, fma(load(plan.total + i), load(plan.alpha + i), load(plan.sum + i)));
  }
}

inline void scale_row(float* row, int64_t n, float factor) {
  for (int64_t j = 0; j < n; j += 16) store(row + j, mul(load(row + j), set1(factor)));
}

// out[i] and lse[i] of a finished row. Adding +0 turns a sum of -0 into +0: whether a sum of zeros has a sign depends on how many zeros
// were added.
template <class Unit>
inline void finish_row(const ForwardPlan<Unit>& plan, int64_t i, bool any_key, int64_t Dv, typename Unit::T* out, float* lse) {
  const V16 total = set1(plan.total[i]);
  for (int64_t j = 0; j < Dv; j += 16) {
    const V16 o = any_key ? div(add(load(plan.sums.acc + i * plan.sums.ld + j), zero()), total) : zero();
    store_n(out + j, o, lanes(Dv - j));
  }
  if (lse == nullptr) return;
  const double sum = static_cast<double>(plan.max[i]) + log64(static_cast<double>(plan.total[i]));
  *lse = any_key ? static_cast<float>(sum) : __builtin_inff();
}

template <class Unit, class T = typename Unit::T>
void attend_begin(const ForwardPlan<Unit>& plan, const QueryRows& rows, const T* q) {
  for (int64_t i = 0; i < round_up(rows.count, 16); ++i) {
    plan.max[i] = -__builtin_inff();
    plan.next[i] = plan.alpha[i] = plan.sum[i] = plan.total[i] = 0.0f;
  }
  std::memset(plan.sums.acc, 0, static_cast<size_t>(rows.count * plan.sums.ld) * 4);
  plan.queries.pack(rows, q);
}

// A block of n keys, the first of them key `first`.
template <class Unit, class Fetch, class T = typename Unit::T>
void attend_block(const ForwardPlan<Unit>& plan, const QueryRows& rows, const KeyBlock<T>& block, int64_t first, int64_t n, float scale,
                  Fetch& fetch_k, Fetch& fetch_v) {
  const auto& sums = plan.sums;
  const int64_t from = count_seen(rows, first, n, Unit::kTileRows, plan.seen);
  plan.queries.times_keys(from, rows.count, block.k, block.k_stride, n, plan.scores, fetch_k);
  softmax_step(plan, from, rows.count, scale);
  for (int64_t i = from; i < rows.count; ++i) {
    if (plan.alpha[i] != 1.0f) scale_row(sums.acc + i * sums.ld, sums.ld, plan.alpha[i]);
  }
  sums.add(plan.scores, plan.seen, from, rows.count, block.v, block.v_stride, n, fetch_v);
}

// Kv heads of an item whose rows are fetched side by side: on Zen 5 pieces of 1 KB (fp32, 128 values) arrive up to 10 % faster than those
// of one head. In longer ones that are no whole rows the CPU's own fetching runs on into another thread's heads: 4 heads lose what 2 gain.
// Pieces of less than 512 bytes are too short (4 heads of 64 in bf16: 5 to 7 % faster than 2).
inline int64_t fetch_groups(int64_t row_bytes) { return row_bytes < 256 ? 512 / row_bytes : 2; }

// The rows of `groups` kv heads, of which `rows` and `keys` are the first. Keys::block(first, n, gathered) gives n keys; gathered has room
// for kBlockKeys rows of Dk if Keys asks for it. If it does, Keys::row(j, v) is where key j lies, or its value; if not, Keys::fetch fetches
// a block of keys or values.
template <class Unit, class Keys, class T = typename Unit::T>
void attend(const QueryRows& rows, const Keys& keys, int64_t groups, const AttendShape& shape, const T* q, T* out, float* lse) {
  const auto plans = plan_in_scratch<ForwardPlans<Unit>>(groups, rows.count, shape, Keys::kGathered);
  for (int64_t g = 0; g < groups; ++g) attend_begin(plans.group(g), rows.group(g), q);
  const int64_t all = rows.seen(rows.count - 1), size = sizeof(T), tiles = (rows.count + kRows - 1) / kRows;
  const int64_t side_by_side = fetch_groups(shape.Dk * size);
  for (int64_t first = 0; first < all; first += kBlockKeys) {
    const int64_t n = least(kBlockKeys, all - first);
    for (int64_t g = 0; g < groups; g += side_by_side) {
      // While these kv heads' blocks are multiplied, those of the next kv heads are fetched, or the next ones of the first.
      const int64_t end = least(g + side_by_side, groups), next_g = end == groups ? 0 : end, next = next_g == 0 ? first + n : first;
      const int64_t next_n = next < all ? least(kBlockKeys, all - next) : 0, calls = (end - g) * tiles * 2;
      const auto fetch = [&](bool v, int64_t D) {
        if constexpr (Keys::kGathered == 0) {
          const int64_t row_bytes = least(side_by_side, groups - next_g) * D * size;
          return keys.group(next_g).fetch(v, next, next_n, all, row_bytes, calls * ((D + 31) / 32));
        } else {
          return FetchRows([&keys](int64_t j) { return keys.row(j, false); }, next, v ? next : next + next_n, D * size,
                           calls * ((D + 31) / 32));
        }
      };
      auto fetch_k = fetch(false, shape.Dk), fetch_v = fetch(true, shape.Dv);
      for (int64_t h = g; h < end; ++h) {
        const auto plan = plans.group(h);
        attend_block(plan, rows.group(h), keys.group(h).block(first, n, plan.gathered), first, n, shape.scale, fetch_k, fetch_v);
      }
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    const QueryRows group = rows.group(g);
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t at = group.at(i);
      finish_row(plans.group(g), i, group.seen(i) > 0, shape.Dv, out + at * shape.Dv, lse == nullptr ? nullptr : lse + at);
    }
  }
}

// What the backward reads of the forward: its inputs, its results, and what comes from above.
template <class T>
struct AttendGradient {
  const T *q, *d_out;        // [query rows, Dk], [query rows, Dv]
  const float *lse, *delta;  // [query rows]; delta: d_out . out
};

// delta = d_out . out, in lanes.
template <class T>
inline float gradient_delta(const T* d_out, const T* out, int64_t Dv) {
  V16 sum = zero();
  for (int64_t j = 0; j < Dv; j += 16) sum = fma(load_n(d_out + j, lanes(Dv - j)), load_n(out + j, lanes(Dv - j)), sum);
  return fold_add(sum);
}

// From s = q . k and dp = d_out . v of one row: s becomes p, dp becomes ds, both rounded; zeros where the row does not see the key.
template <class T>
inline void score_gradient(float* s, float* dp, int32_t seen, float scale, float lse, float delta) {
  const T* rounding = nullptr;
  for (int64_t j = 0; j < kBlockKeys; j += 16) {
    const V16 p = exp16_below_88(sub(mul(load(s + j), set1(scale)), set1(lse)));
    const V16 ds = mul(mul(p, sub(load(dp + j), set1(delta))), set1(scale));
    store(s + j, if_seen(seen, j, round_to(p, rounding), zero()));
    store(dp + j, if_seen(seen, j, round_to(ds, rounding), zero()));
  }
}

// sum + 0, rounded: a gradient leaves the accumulator.
template <class T>
inline void store_gradient(const float* acc, int64_t D, T* out) {
  for (int64_t j = 0; j < D; j += 16) {
    const int n = lanes(D - j);
    store_n(out + j, add(load_n(acc + j, n), zero()), n);
  }
}

template <class Unit>
struct QueryGradientPlan {
  float* panel;
  typename Unit::Queries q, d_out;
  typename Unit::Sums sums;
  float *s, *dp;
  int32_t* seen;
  typename Unit::T* gathered;
  QueryGradientPlan(Pieces& pieces, int64_t rows, const AttendShape& shape, int64_t gathered_rows)
      : panel(pieces.take(kPanelWords)),
        q(pieces, rows, shape.Dk, panel),
        d_out(pieces, rows, shape.Dv, panel),
        sums(pieces, rows, shape.Dk, panel) {
    const int64_t all = round_up(rows, Unit::kTileRows);
    s = pieces.take(all * kBlockKeys);
    dp = pieces.take(all * kBlockKeys);
    seen = pieces.take<int32_t>(rows);
    gathered = reinterpret_cast<typename Unit::T*>(pieces.take(gathered_rows * shape.Dk));
  }
};

// dq of these rows: ds @ keys over the blocks in order. Sink::block(first, n, p, ds) sees each block's p and ds, [rows][kBlockKeys].
template <class Unit, class Keys, class Sink, class T = typename Unit::T>
void attend_query_gradient(const QueryRows& rows, const Keys& keys, const AttendShape& shape, const AttendGradient<T>& in, T* dq,
                           const Sink& sink) {
  const auto plan = plan_in_scratch<QueryGradientPlan<Unit>>(rows.count, shape, Keys::kGathered);
  const auto& sums = plan.sums;
  std::memset(sums.acc, 0, static_cast<size_t>(rows.count * sums.ld) * 4);
  plan.q.pack(rows, in.q);
  plan.d_out.pack(rows, in.d_out);
  const int64_t all = rows.seen(rows.count - 1);
  for (int64_t first = 0; first < all; first += kBlockKeys) {
    const int64_t n = least(kBlockKeys, all - first);
    const KeyBlock<T> block = keys.block(first, n, plan.gathered);
    const int64_t from = count_seen(rows, first, n, Unit::kTileRows, plan.seen);
    plan.q.times_keys(from, rows.count, block.k, block.k_stride, n, plan.s);
    plan.d_out.times_keys(from, rows.count, block.v, block.v_stride, n, plan.dp);
    for (int64_t i = from; i < rows.count; ++i) {
      const int64_t at = rows.at(i);
      score_gradient<T>(plan.s + i * kBlockKeys, plan.dp + i * kBlockKeys, plan.seen[i], shape.scale, in.lse[at], in.delta[at]);
    }
    sums.add(plan.dp, plan.seen, from, rows.count, block.k, block.k_stride, n);
    sink.block(first, n, plan.s, plan.dp);
  }
  for (int64_t i = 0; i < rows.count; ++i) store_gradient(sums.acc + i * sums.ld, shape.Dk, dq + rows.at(i) * shape.Dk);
}
