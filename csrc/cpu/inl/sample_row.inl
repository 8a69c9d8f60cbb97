// One row of logits under its SampleRules: what its tokens weigh, which of them stay, and the draw of one. ops.h states the rule; sample
// and mtp_verify share this. Included after vec.h, vec64.h, core/workspace.h, inside an anonymous namespace.
#pragma once
#include "cpu/inl/mass.inl"
#include "cpu/inl/math64.inl"
#include "cpu/inl/philox.inl"
#include "cpu/inl/pieces.inl"

constexpr int64_t kDigits = 2048;  // of a key of 32 bits: 11, 11 and 10 of them
constexpr int64_t kFew = 48;       // tokens that are sorted faster than three histograms are filled

struct RowScratch {
  float* row;       // the logits, where a rule changes some
  int32_t* count;   // how often the row has generated a token
  float* lane_max;  // sixteen for each block
  uint64_t* block;  // the mass of each block
  float* value;     // the tokens that stay: logit, id, mass, in the order of ids
  int32_t* id;
  uint64_t* mass;
  uint64_t* digit;  // a histogram
  int32_t* place;   // in the list, of the tokens that a select is left with
  RowScratch(Pieces& pieces, int64_t V) {
    const int64_t blocks = (V + kMassBlock - 1) / kMassBlock;
    row = pieces.take(V);
    count = reinterpret_cast<int32_t*>(pieces.take(V));
    lane_max = pieces.take(blocks * 16 + 16);
    block = reinterpret_cast<uint64_t*>(pieces.take(2 * blocks));
    value = pieces.take(V + 32);
    id = reinterpret_cast<int32_t*>(pieces.take(V + 32));
    mass = reinterpret_cast<uint64_t*>(pieces.take(2 * (V + 32)));
    digit = reinterpret_cast<uint64_t*>(pieces.take(2 * kDigits));
    place = count;  // no longer needed by then
  }
};

// The tokens that a row may draw: a list, or all whose scaled logit is not below scale.lowest.
struct Odds {
  RowMasses all;
  bool listed;
  int64_t n;       // of the list
  uint64_t total;  // the mass of all that stay
};

// Descending logits as ascending integers. The values are canonical.
inline uint32_t rank_key(float value) { return static_cast<uint32_t>(order_of(value)) ^ 0x7fffffffu; }

// In the order (logit descending, list ascending): the first token at which the running sum of weights reaches `need`, 1 <= need <= their
// sum, as its key and how many tokens of that key come up to it.
struct Cut {
  uint32_t key;
  int64_t ties;
};

template <class Weight>
Cut cut_of_few(const float* value, int64_t n, Weight weight, uint64_t need) {
  int32_t order[kFew];
  uint32_t key[kFew];
  for (int32_t i = 0; i < n; ++i) {
    const uint32_t own = rank_key(value[i]);
    int32_t at = i;
    for (; at > 0 && key[at - 1] > own; --at) key[at] = key[at - 1], order[at] = order[at - 1];
    key[at] = own;
    order[at] = i;
  }
  Cut cut{key[0], 0};
  for (int32_t i = 0;; ++i) {
    cut = {key[i], key[i] == cut.key ? cut.ties + 1 : 1};
    if (need <= weight(order[i])) return cut;
    need -= weight(order[i]);
  }
}

template <class Weight>
Cut cut_at(const RowScratch& s, int64_t n, Weight weight, uint64_t need) {
  if (n <= kFew) return cut_of_few(s.value, n, weight, need);
  constexpr int kShifts[] = {21, 10, 0};
  uint32_t found = 0;  // the leading bits of the key
  int64_t left = n;    // tokens that have them: all, then those of `place`
  for (const int shift : kShifts) {
    const uint32_t digits = shift == 0 ? kDigits / 2 : kDigits;
    const bool all = shift == kShifts[0];
    std::memset(s.digit, 0, digits * sizeof(uint64_t));
    for (int64_t j = 0; j < left; ++j) {
      const int64_t i = all ? j : s.place[j];
      s.digit[(rank_key(s.value[i]) >> shift) & (digits - 1)] += weight(i);
    }
    uint32_t d = 0;
    while (need > s.digit[d]) need -= s.digit[d++];
    found |= d << shift;
    int64_t matching = 0;
    for (int64_t j = 0; j < left; ++j) {
      const int64_t i = all ? j : s.place[j];
      s.place[matching] = static_cast<int32_t>(i);
      matching += rank_key(s.value[i]) >> shift == found >> shift ? 1 : 0;
    }
    left = matching;
  }
  for (int64_t j = 0;; ++j) {
    if (need <= weight(s.place[j])) return {found, j + 1};
    need -= weight(s.place[j]);
  }
}

// Keeps the tokens up to the cut, in order. Their number.
inline int64_t keep_to(Cut cut, const RowScratch& s, int64_t n, bool masses) {
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = rank_key(s.value[i]);
    const bool tie = key == cut.key && cut.ties > 0;
    s.value[kept] = s.value[i];
    s.id[kept] = s.id[i];
    if (masses) s.mass[kept] = s.mass[i];
    kept += (key < cut.key) | tie ? 1 : 0;
    cut.ties -= tie ? 1 : 0;
  }
  return kept;
}

// Lists the tokens whose logit is not below x_floor and whose scaled logit is not below z_floor. Their number.
inline int64_t list_above(const RowMasses& all, V16 x_floor, V16 z_floor, const RowScratch& s) {
  int64_t n = 0;
  for (int64_t i = 0; i < all.V; i += 16) {
    const V16 x = ordered(logits_at(all.row, i, all.V));
    uint32_t mask = ~(mask_lt(x, x_floor) | mask_lt(scaled(x, all.scale), z_floor)) & (i + 16 <= all.V ? 0xffffu : (1u << (all.V - i)) - 1);
    if (mask == 0) continue;
    alignas(64) float lane[16];
    store(lane, x);
    for (; mask != 0; mask &= mask - 1, ++n) {
      const int bit = __builtin_ctz(mask);
      s.value[n] = lane[bit];
      s.id[n] = static_cast<int32_t>(i + bit);
    }
  }
  return n;
}

// Masses of the list, and their sum.
inline uint64_t weigh_list(const RowScratch& s, int64_t n, const Scale& scale) {
  store(s.value + n, set1(-__builtin_inff()));  // what the last vector reads past the list
  uint64_t total = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const Masses m = masses_of(scaled(load(s.value + i), scale), scale.lowest);
    double lane[16];
    store8(lane, m.low);
    store8(lane + 8, m.high);
    for (int j = 0; j < 16; ++j) total += s.mass[i + j] = mass_units(lane[j]);
  }
  return total;
}

inline uint64_t sum_list(const RowScratch& s, int64_t n) {
  uint64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += s.mass[i];
  return total;
}

// The mass that top_p asks for: the product in fp64, rounded up to a whole unit.
inline uint64_t nucleus(uint64_t total, float top_p) {
  const double part = static_cast<double>(static_cast<int64_t>(total)) * static_cast<double>(top_p);
  uint64_t need = static_cast<uint64_t>(static_cast<int64_t>(part));
  if (static_cast<double>(static_cast<int64_t>(need)) < part) ++need;
  return need < 1 ? 1 : need > total ? total : need;
}

// A scaled logit below which no token of a nucleus lies: V tokens below it have less than 0.98 (1 - top_p) of the total, rounding of each
// to units of 2^-42 included.
inline float nucleus_floor(uint64_t total, float top_p, int64_t V) {
  const double spare = (1.0 - static_cast<double>(top_p)) * static_cast<double>(static_cast<int64_t>(total)) * 0x1p-42;
  const double each = 0.98 * spare / static_cast<double>(V) - 0x1p-42;
  if (each < 0x1p-42) return kNoMass;
  const float floor = static_cast<float>(log64(each));
  return floor < kNoMass ? kNoMass : floor;
}

// The logits of the row with its bias and penalties: the row itself where there are none.
inline const float* ruled_logits(const SampleRules& rules, int64_t r, const float* row, int64_t V, const RowScratch& s) {
  const int64_t* span = rules.history == nullptr ? nullptr : rules.history + 3 * r;
  const bool penalised = span != nullptr && span[0] < span[2] &&
                         (rules.repetition_penalty[r] != 1.0f || rules.presence_penalty[r] != 0.0f || rules.frequency_penalty[r] != 0.0f);
  const int64_t* biased = rules.bias_spans == nullptr ? nullptr : rules.bias_spans + 2 * r;
  if (!penalised && (biased == nullptr || biased[0] == biased[1])) return row;
  std::memcpy(s.row, row, static_cast<size_t>(V) * sizeof(float));
  for (int64_t i = biased == nullptr ? 0 : biased[0]; biased != nullptr && i < biased[1]; ++i)
    s.row[rules.bias_ids[i]] += rules.bias_values[i];
  if (!penalised) return s.row;
  const float repetition = rules.repetition_penalty[r], presence = rules.presence_penalty[r], frequency = rules.frequency_penalty[r];
  std::memset(s.count, 0xff, static_cast<size_t>(V) * sizeof(int32_t));  // -1: not seen
  for (int64_t i = span[0]; i < span[2]; ++i) {
    int32_t& count = s.count[rules.token_ids[i]];
    count = (count < 0 ? 0 : count) + (i < span[1] ? 0 : 1);
  }
  for (int64_t i = span[0]; i < span[2]; ++i) {
    const int64_t token = rules.token_ids[i];
    const int32_t count = s.count[token];
    if (count < 0) continue;
    s.count[token] = -1;
    float x = s.row[token];
    x = x > 0.0f ? x / repetition : x * repetition;
    if (count > 0) {
      x = x - frequency * static_cast<float>(count);
      x = x - presence;
    }
    s.row[token] = x;
  }
  return s.row;
}

inline Odds one_token(const RowScratch& s, Odds odds, int64_t token) {
  s.id[0] = static_cast<int32_t>(token);
  s.mass[0] = kMassOne;
  odds.listed = true;
  odds.n = 1;
  odds.total = kMassOne;
  return odds;
}

// Row r. `greedy`: as if its temperature were 0.
inline Odds row_odds(const SampleRules& rules, int64_t r, const float* logits, int64_t V, bool greedy, const RowScratch& s) {
  const float* row = ruled_logits(rules, r, logits, V, s);
  const float temperature = rules.temperature[r], top_p = rules.top_p[r], min_p = rules.min_p[r];
  int64_t top_k = rules.top_k[r];
  float peak = lane_maxima(row, V, s.lane_max);
  Odds odds{};
  if (greedy || temperature == 0.0f || top_k == 1) return one_token(s, odds, first_at(row, V, s.lane_max, peak));
  const V16 lowest = set1(-__builtin_inff());
  if (peak - peak != 0.0f) {  // infinite: the tokens that have it share everything
    const V16 infinite = set1(peak);
    for (int64_t i = 0; i < V; i += 16) {
      const V16 x = max(lowest, logits_at(row, i, V));
      store_n(s.row + i, select_lt(x, infinite, lowest, zero()), lanes(V - i));
    }
    row = s.row;
    peak = lane_maxima(row, V, s.lane_max);
  }
  const float least_z = min_p > 0.0f ? static_cast<float>(log64(static_cast<double>(min_p))) : -__builtin_inff();
  odds.all = {row, V, {set1(peak), set1(1.0f / temperature), set1(least_z)}};
  const Scale& scale = odds.all.scale;
  uint64_t need = 0;  // of the nucleus
  if (top_k == 0 || top_k >= V) {
    odds.total = sum_blocks(odds.all, s.block);
    if (top_p >= 1.0f) return odds;
    need = nucleus(odds.total, top_p);
    const float last = nucleus_floor(odds.total, top_p, V);
    for (float floor = -4.0f;; floor -= 2.0f) {  // most nuclei lie high, and short lists are cheap
      if (floor - 2.0f < last) floor = last;
      odds.n = list_above(odds.all, lowest, set1(floor < least_z ? least_z : floor), s);
      if (weigh_list(s, odds.n, scale) >= need || floor == last) break;
    }
  } else {
    const int64_t maxima = (V + kMassBlock - 1) / kMassBlock * 16;
    const V16 floor = top_k <= maxima ? set1(cut_of_largest(s.lane_max, maxima, top_k)) : lowest;
    odds.n = list_above(odds.all, floor, scale.lowest, s);
    if (odds.n > top_k) {
      const auto one = [](int64_t) { return uint64_t{1}; };
      odds.n = keep_to(cut_at(s, odds.n, one, static_cast<uint64_t>(top_k)), s, odds.n, false);
    }
    odds.total = weigh_list(s, odds.n, scale);
    need = nucleus(odds.total, top_p);
  }
  odds.listed = true;
  if (top_p < 1.0f) {
    const auto weight = [&](int64_t i) { return s.mass[i]; };
    odds.n = keep_to(cut_at(s, odds.n, weight, need), s, odds.n, true);
    odds.total = sum_list(s, odds.n);
  }
  return odds;
}

inline int64_t drawn_from_list(const RowScratch& s, uint64_t place) {
  int64_t i = 0;
  while (place >= s.mass[i]) place -= s.mass[i++];
  return s.id[i];
}

inline int64_t sample_row(const SampleRules& rules, int64_t r, const float* logits, int64_t V, bool greedy, uint32_t draw,
                          const RowScratch& s) {
  const Odds odds = row_odds(rules, r, logits, V, greedy, s);
  if (odds.listed && odds.n == 1) return s.id[0];
  const uint64_t place = place_of(coin24(rules.seeds[r], rules.positions[r], draw), odds.total);
  return odds.listed ? drawn_from_list(s, place) : token_at(odds.all, s.block, place);
}
