// Query tokens that list keys: finding the keys, and adding a token's products to the rows of those that it lists. What sparse_mla and
// indexer_kl share. Included after vec.h, vec64.h and transpose.h, inside their anonymous namespace.
#pragma once
#include "cpu/inl/attend.inl"
#include "cpu/inl/key_rows.inl"

constexpr int64_t kCacheRange = 256;  // cache rows of an item of their gradient: sums of 576 KB in fp32 are spread over all tokens

// The sequence of a query row: the last one that begins at or before it.
inline int64_t sequence_of(const Sequences& s, int64_t token) {
  int64_t low = 0, high = s.B - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (s.cu_seqlens_q[middle] <= token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Lists end where the first -1 stands.
inline int64_t list_length(const int32_t* list, int64_t top_k) {
  int64_t low = 0, high = top_k;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (list[middle] >= 0) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// First position of an ascending list of n at which the key is `key` or more.
inline int64_t list_position(const int32_t* list, int64_t n, int64_t key) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (list[middle] < key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class T>
struct ListedKeys {
  static constexpr int64_t kGathered = kBlockKeys;
  const Sequences& s;
  int64_t sequence;
  const int32_t* list;
  const T* kv;
  int64_t Dk;
  const T* row(int64_t place, bool) const { return kv + key_row(s, sequence, list[place]) * Dk; }
  const ListedKeys& group(int64_t) const { return *this; }
  KeyBlock<T> block(int64_t first, int64_t n, T* gathered) const {
    const int64_t last = list[first + n - 1];
    const bool one_page = s.block_table == nullptr || list[first] / kPageRows == last / kPageRows;
    if (one_page && last - list[first] == n - 1) return {row(first, false), row(first, false), Dk, Dk};
    for (int64_t j = 0; j < n; ++j) std::memcpy(gathered + j * Dk, row(first + j, false), static_cast<size_t>(Dk) * sizeof(T));
    return {gathered, gathered, Dk, Dk};
  }
};

// What add_token needs for rows of up to D values.
template <class T>
struct AddPlan {
  Word<T>*panel, *room;
  float* products;
  AddPlan(Pieces& pieces, int64_t D)
      : panel(pieces.take<Word<T>>(kBlockKeys * kCols)),
        room(pieces.take<Word<T>>(weight_room<Word<T>>(kBlockKeys))),
        products(pieces.take(kBlockKeys * round_up(D, kCols))) {}
};

// row(position)[0, D) += the sum over the heads of a token of weights[head][position] * matrix[head], for positions [begin, end) of its
// list; the weights of each block of the list are [all_heads][kBlockKeys]. Rows that lie side by side are added to where they are.
template <class T, class Row>
inline void add_token(const AddPlan<T>& plan, int64_t all_heads, const float* weights, int64_t begin, int64_t end, const T* matrix,
                      int64_t D, Row row) {
  const int64_t ld = round_up(D, kCols);
  for (int64_t from = begin; from < end;) {
    const int64_t block = from / kBlockKeys, to = least(end, (block + 1) * kBlockKeys), n = to - from;
    const float* w = weights + block * all_heads * kBlockKeys + from % kBlockKeys;
    const bool in_place = D == ld && row(to - 1) == row(from) + (n - 1) * D;
    float* sums = in_place ? row(from) : plan.products;
    for (int64_t i = 0; !in_place && i < n; ++i) std::memcpy(sums + i * ld, row(from + i), static_cast<size_t>(D) * 4);
    for (int64_t head = 0; head < all_heads; head += kBlockKeys) {
      const int64_t heads = least(kBlockKeys, all_heads - head);
      const Word<T>* words = key_words(w + head * kBlockKeys, heads, n, plan.room);
      for (int64_t j = 0; j < D; j += kCols) {
        pack_panel_columns<T>([&](int64_t h) { return matrix + (head + h) * D + j; }, least(kCols, D - j), heads, plan.panel);
        for (int64_t i = 0; i < n; i += kRows) {
          tile_times_panel_n<KeyTile<Word<T>>>(n - i, words + i, plan.panel, sums + i * ld + j, ld, heads);
        }
      }
    }
    for (int64_t i = 0; !in_place && i < n; ++i) std::memcpy(row(from + i), sums + i * ld, static_cast<size_t>(D) * 4);
    from = to;
  }
}
