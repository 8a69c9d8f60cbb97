// mtp_verify: which drafts of a chain the model accepts, and the token of its own behind them; three modes
// Contract   include/glmx/ops.h MtpVerifyParams   Oracle reference/mtp_verify.py   Doc docs/ops/mtp_verify.md
// Shapes     draft_ids [B,K] i64 | logits [B,K+1,V] f32 | draft_probs [B,K,V] f32 or null | tokens [B,K+1] i64 | packed [R] i64
// Layout     row-major; row j of a sequence judges draft j. Rows behind the last token that is given out are not read. With row_offsets
//            all of them are [R] and [R,V], of as many rows for each sequence as the offsets say
// Numerics   masses and coins as in sample; the acceptance test and P - q S in fp64, the residual rounded to whole units again, so that its
//            sums are exact too. A sequence reads nothing but itself: its tokens depend on neither batch, row nor number of drafts
// Algorithm  an item is a sequence: row after row until a draft is refused or none is left, then one draw. Packing: one pass at the end
// Work/bytes that of sample for each row up to the first refusal; a refusal reads its row and its draft_probs twice more
// Measured   docs/ops/mtp_verify.md
// Limits     V up to 2^20; ids, rules and spans are checked in ops/mtp_verify.cpp

#include "cpu/inl/sample_row.inl"

// What a refused draft leaves of the masses: P - q * S where that is positive, in whole units. q: NaN and negative count as 0.
struct ResidualMasses {
  RowMasses kept;
  const float* q;
  double total;  // S
  int64_t V;
  static D8 rest(D8 mass, D8 q, D8 total) {
    const D8 left = sub(mass, mul(q, total));
    return whole_units(select_bit(left, 63, set1d(0.0), left));
  }
  Masses at(int64_t i) const {
    const Masses m = kept.at(i);
    const V16 p = max(zero(), load_n(q + i, lanes(V - i)));
    return {rest(m.low, widen_low(p), set1d(total)), rest(m.high, widen_high(p), set1d(total))};
  }
};

// The same where the draft was certain: everything but the draft.
struct OtherMasses {
  RowMasses kept;
  int64_t draft, V;
  Masses at(int64_t i) const {
    Masses m = kept.at(i);
    if (draft < i || draft >= i + 16) return m;
    double lane[16];
    store8(lane, m.low);
    store8(lane + 8, m.high);
    lane[draft - i] = 0.0;
    return {load8(lane), load8(lane + 8)};
  }
};

inline float probability(const float* q, int64_t token) { return q[token] > 0.0f ? q[token] : 0.0f; }

inline uint64_t mass_of(const Odds& odds, int64_t token, const RowScratch& s) {
  if (odds.listed) {
    for (int64_t i = 0; i < odds.n; ++i) {
      if (s.id[i] == token) return s.mass[i];
    }
    return 0;
  }
  double lane[16];
  const Masses m = odds.all.at(token & ~int64_t{15});
  store8(lane, m.low);
  store8(lane + 8, m.high);
  return mass_units(lane[token & 15]);
}

template <class Source>
int64_t residual_token(const Source& source, const RowMasses& all, uint64_t coin, const RowScratch& s) {
  const uint64_t rest = sum_blocks(source, s.block);
  if (rest != 0) return token_at(source, s.block, place_of(coin, rest));
  const uint64_t total = sum_blocks(all, s.block);
  return token_at(all, s.block, place_of(coin, total));
}

// The token in place of a refused draft.
inline int64_t replacement(const Odds& odds, const float* q, int64_t draft, double total, uint64_t coin, const RowScratch& s) {
  if (!odds.listed) {
    if (q == nullptr) return residual_token(OtherMasses{odds.all, draft, odds.all.V}, odds.all, coin, s);
    return residual_token(ResidualMasses{odds.all, q, total, odds.all.V}, odds.all, coin, s);
  }
  const auto rest = [&](int64_t i) {
    const double p = q == nullptr ? (s.id[i] == draft ? 1.0 : 0.0) : static_cast<double>(probability(q, s.id[i]));
    const double left = static_cast<double>(static_cast<int64_t>(s.mass[i])) * 0x1p-42 - p * total;
    return left > 0.0 ? mass_units((left + 1024.0) - 1024.0) : 0;
  };
  uint64_t sum = 0;
  for (int64_t i = 0; i < odds.n; ++i) sum += rest(i);
  if (sum == 0) return drawn_from_list(s, place_of(coin, odds.total));
  uint64_t place = place_of(coin, sum);
  for (int64_t i = 0;; ++i) {
    const uint64_t mass = rest(i);
    if (place < mass) return s.id[i];
    place -= mass;
  }
}

// Row r, which judges the draft at place d: the token that it gives out.
inline int64_t verified_token(const MtpVerifyParams& p, int64_t r, int64_t d, int64_t draft, const RowScratch& s) {
  const float* logits = p.logits + r * p.V;
  if (draft < 0 || p.mode != VerifyMode::rejection)
    return sample_row(p.rules, r, logits, p.V, p.mode == VerifyMode::greedy, kDrawTarget, s);
  const float* q = p.draft_probs == nullptr ? nullptr : p.draft_probs + d * p.V;
  const Odds odds = row_odds(p.rules, r, logits, p.V, false, s);
  const double total = static_cast<double>(static_cast<int64_t>(odds.total)) * 0x1p-42;
  const double mass = static_cast<double>(static_cast<int64_t>(mass_of(odds, draft, s))) * 0x1p-42;
  const int64_t seed = p.rules.seeds[r], position = p.rules.positions[r];
  const double u = static_cast<double>(static_cast<int64_t>(coin24(seed, position, kDrawAccept))) * 0x1p-24;
  const double certain = q == nullptr ? 1.0 : static_cast<double>(probability(q, draft));
  if (u * certain * total < mass) return draft;
  return replacement(odds, q, draft, total, coin24(seed, position, kDrawResidual), s);
}

inline int64_t first_row(const MtpVerifyParams& p, int64_t b) { return p.row_offsets == nullptr ? b * (p.K + 1) : p.row_offsets[b]; }

inline void verify_item(void* context, int64_t b) {
  const MtpVerifyParams& p = *static_cast<const MtpVerifyParams*>(context);
  const auto s = plan_in_scratch<RowScratch>(p.V);
  const int64_t row = first_row(p, b), drafts = first_row(p, b + 1) - row - 1, place = p.row_offsets == nullptr ? b * p.K : row;
  int64_t* tokens = p.tokens + row;
  int64_t j = 0;
  for (;; ++j) {
    const int64_t draft = j < drafts ? p.draft_ids[place + j] : -1;
    tokens[j] = verified_token(p, row + j, place + j, draft, s);
    if (tokens[j] != draft) break;
  }
  p.accepted[b] = j;
  for (++j; j <= drafts; ++j) tokens[j] = -1;
}

inline void verify_chains(const MtpVerifyParams& p) {
  parallel_items(p.B, p.R * (p.V + 200), verify_item, const_cast<MtpVerifyParams*>(&p));
  int64_t packed = 0;
  p.packed_offsets[0] = 0;
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t j = 0; j <= p.accepted[b]; ++j) p.packed_ids[packed++] = p.tokens[first_row(p, b) + j];
    p.packed_offsets[b + 1] = static_cast<int32_t>(packed);
  }
  for (; packed < p.R; ++packed) p.packed_ids[packed] = -1;
}
