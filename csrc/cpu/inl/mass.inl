// Masses: what a token weighs against the largest logit of its row, as whole multiples of 2^-42. Sums of them are exact, so no order of
// additions, no split over blocks and no selection can show in a result. Included after vec.h and vec64.h, inside their anonymous
// namespace.
#pragma once
#include "cpu/inl/largest.inl"
#include "cpu/inl/vec_math.inl"

constexpr uint64_t kMassOne = uint64_t{1} << 42;  // of the largest logit; a vocabulary of 2^20 stays below 2^62
constexpr int64_t kMassBlock = 1024;              // tokens whose masses an fp64 still sums exactly: up to 2^11, in units of 2^-42
constexpr float kNoMass = -30.0f;                 // e^z < 2^-43 rounds to 0 below it

// z = (x - peak) / temperature; a z below `lowest` weighs nothing.
struct Scale {
  V16 peak, inverse_temperature, lowest;
};
inline V16 scaled(V16 x, const Scale& s) { return mul(sub(x, s.peak), s.inverse_temperature); }

struct Masses {
  D8 low, high;
};
inline D8 whole_units(D8 w) { return sub(add(w, set1d(1024.0)), set1d(1024.0)); }  // an fp64 at 1024 has a spacing of 2^-42
inline Masses masses_of(V16 z, V16 lowest) {
  const ExpParts e = exp_parts16(max(set1(-80.0f), z));  // NaN becomes -80
  const V16 w = select_lt(z, lowest, zero(), mul(e.y, pow2(e.n)));
  return {whole_units(widen_low(w)), whole_units(widen_high(w))};
}
inline uint64_t mass_units(double m) { return static_cast<uint64_t>(static_cast<int64_t>(m * 0x1p+42)); }

// Sixteen logits from i on; places past the row are -inf.
inline V16 logits_at(const float* row, int64_t i, int64_t V) {
  if (i + 16 <= V) return load(row + i);
  alignas(64) float lane[16];
  for (int j = 0; j < 16; ++j) lane[j] = i + j < V ? row[i + j] : -__builtin_inff();
  return load(lane);
}
// The value that the total order compares: NaN as -inf, -0 and denormals as +0.
inline V16 ordered(V16 x) { return max(set1(-__builtin_inff()), add(x, zero())); }

// Masses of the logits as they are.
struct RowMasses {
  const float* row;
  int64_t V;
  Scale scale;
  Masses at(int64_t i) const { return masses_of(scaled(logits_at(row, i, V), scale), scale.lowest); }
};

// The sum of each block of kMassBlock tokens, and of all.
template <class Source>
uint64_t sum_blocks(const Source& source, uint64_t* block) {
  uint64_t total = 0;
  for (int64_t begin = 0, b = 0; begin < source.V; begin += kMassBlock, ++b) {
    const int64_t end = least(begin + kMassBlock, source.V);
    D8 low = set1d(0.0), high = set1d(0.0);
    for (int64_t i = begin; i < end; i += 16) {
      const Masses m = source.at(i);
      low = add(low, m.low);
      high = add(high, m.high);
    }
    block[b] = mass_units(fold_add(add(low, high)));
    total += block[b];
  }
  return total;
}

// The first token at which the running sum exceeds `place`, which is below the total.
template <class Source>
int64_t token_at(const Source& source, const uint64_t* block, uint64_t place) {
  int64_t b = 0;
  while (place >= block[b]) place -= block[b++];
  for (int64_t i = b * kMassBlock;; i += 16) {
    const Masses m = source.at(i);
    double lane[16];
    store8(lane, m.low);
    store8(lane + 8, m.high);
    for (int j = 0; j < 16; ++j) {
      const uint64_t mass = mass_units(lane[j]);
      if (place < mass) return i + j;
      place -= mass;
    }
  }
}

// The largest value of a row, canonical, and the largest of each of the sixteen lanes of each block of kMassBlock tokens.
inline float lane_maxima(const float* row, int64_t V, float* lane_max) {
  const V16 lowest = set1(-__builtin_inff());
  V16 peak = lowest;
  for (int64_t begin = 0; begin < V; begin += kMassBlock, lane_max += 16) {
    V16 best[4] = {lowest, lowest, lowest, lowest};
    int64_t i = begin;
    if (begin + kMassBlock <= V) {
      for (; i < begin + kMassBlock; i += 64) {
        for (int j = 0; j < 4; ++j) best[j] = max(best[j], load(row + i + 16 * j));
      }
    }
    for (; i < V && i < begin + kMassBlock; i += 16) best[0] = max(best[0], logits_at(row, i, V));
    const V16 both = ordered(max(max(best[0], best[1]), max(best[2], best[3])));
    store(lane_max, both);
    peak = max(peak, both);
  }
  return fold_max(peak);
}

// The first token whose logit is `peak`; a row of NaN and -inf gives 0.
inline int64_t first_at(const float* row, int64_t V, const float* lane_max, float peak) {
  if (peak == -__builtin_inff()) return 0;
  const V16 wanted = set1(peak);
  int64_t i = 0;
  while (mask_eq(load(lane_max + i / kMassBlock * 16), wanted) == 0) i += kMassBlock;
  uint32_t mask = 0;
  for (; (mask = mask_eq(logits_at(row, i, V), wanted)) == 0;) i += 16;
  return i + __builtin_ctz(mask);
}
