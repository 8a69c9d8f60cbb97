// The k largest of a list of scores, kept in the order of the list: exact, ties to the earlier one. Included after vec.h, inside its
// anonymous namespace. Scores hold no NaN and no -0.
#pragma once
#include "cpu/inl/sizes.inl"

// The bits of a float as an integer of the same order, and back: its own inverse.
inline int32_t in_order(int32_t bits) { return bits < 0 ? bits ^ 0x7fffffff : bits; }
inline int32_t order_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return in_order(bits);
}
inline float float_at(int32_t order) {
  const int32_t bits = in_order(order);
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// A bit for each of n lanes, of at most 16.
inline uint32_t first_bits(int64_t n) { return n >= 16 ? 0xffffu : (1u << n) - 1; }

// How many of n scores are below x. A whole last vector may be read.
inline int64_t count_below(const float* score, int64_t n, float x) {
  const V16 bound = set1(x);
  int64_t below = 0, i = 0;
  for (; i + 16 <= n; i += 16) below += __builtin_popcount(mask_lt(load(score + i), bound));
  if (i < n) below += __builtin_popcount(mask_lt(load(score + i), bound) & first_bits(n - i));
  return below;
}

// A cut: at most k of n scores are above it, and at least k are not below it; 1 <= k <= n, room for n + 16 scores. The order of floats
// between the least and the largest score is bisected until exactly k scores are left, or one value is.
inline float cut_of_largest(float* score, int64_t n, int64_t k) {
  store(score + n, set1(score[0]));  // what the last vector reads past the list
  V16 high = load(score), low = sub(zero(), high);
  for (int64_t i = 16; i < n; i += 16) {
    const V16 x = load(score + i);
    high = max(high, x);
    low = max(low, sub(zero(), x));
  }
  int64_t from = order_of(0.0f - fold_max(low)), to = order_of(fold_max(high));  // at least k are not below `from`
  while (from < to) {
    const int64_t middle = from + (to - from + 1) / 2;
    const float x = float_at(static_cast<int32_t>(middle));
    const int64_t left = n - count_below(score, n, x);
    if (left == k) return x;
    if (left > k) {
      from = middle;
    } else {
      to = middle - 1;
    }
  }
  return float_at(static_cast<int32_t>(from));
}

// Leaves the k largest of n scores, 1 <= k <= n, and their keys; room for n + 16 of both. Returns a cut: a later score that is not above it
// is not among the k largest of the longer list either.
inline float keep_largest(float* score, int32_t* key, int64_t n, int64_t k) {
  const float cut = cut_of_largest(score, n, k);
  const V16 at_cut = set1(cut);
  int64_t above = 0;
  for (int64_t i = 0; i < n; i += 16) above += __builtin_popcount(mask_lt(at_cut, load(score + i)) & first_bits(n - i));
  int64_t ties = k - above, kept = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const V16 x = load(score + i);
    uint32_t tie = mask_eq(x, at_cut) & first_bits(n - i);
    while (__builtin_popcount(tie) > ties) tie &= ~(0x80000000u >> __builtin_clz(tie));  // the last one
    ties -= __builtin_popcount(tie);
    const uint32_t mask = (mask_lt(at_cut, x) & first_bits(n - i)) | tie;
    compress(score + i, mask, score + kept);
    compress(key + i, mask, key + kept);
    kept += __builtin_popcount(mask);
  }
  return cut;
}
