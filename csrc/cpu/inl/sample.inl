// sample: one token from each row of logits: bias, penalties, temperature, min-p, top-k, top-p, and the coin of (seed, position, draw)
// Contract   include/glmx/ops.h SampleParams   Oracle reference/sample.py   Doc docs/ops/sample.md
// Shapes     logits [R,V] f32 | rules: one number per row each, histories and biases as spans of flat lists | ids [R] i64
// Layout     row-major; the last tokens of a row run the same code on lanes of -inf
// Numerics   a token's mass is e^z in fp32, rounded to a whole multiple of 2^-42: sums of masses are exact integers, so neither lanes nor
//            blocks nor the way a set is found can show. X1, X2, X5: a row reads nothing but itself, and e^z is one polynomial
// Algorithm  an item is a row. One pass: the largest logit, and that of each lane of 1024 tokens; a greedy row is done but for a look at
//            one block. No set asked for: a second pass sums the masses of blocks, the coin picks a block, which is weighed again.
//            top-p: lists of the tokens above z = -4, -6, ... until one holds enough; top-k: a list of those not below the k-th of the
//            lanes' largest. A list is cut by a radix select over counts or masses, three histograms, never sorted; the coin walks it
// Work/bytes 4*V bytes a row once if greedy, twice else, then from the cache; about 25 instructions for 16 masses: bound by arithmetic
// Measured   docs/ops/sample.md
// Limits     V up to 2^20; values and spans of the rules are checked in ops/sample_rules.h

#include "cpu/inl/sample_row.inl"

inline void sample_item(void* context, int64_t r) {
  const SampleParams& p = *static_cast<const SampleParams*>(context);
  const auto s = plan_in_scratch<RowScratch>(p.V);
  p.ids[r] = sample_row(p.rules, r, p.logits + r * p.V, p.V, false, static_cast<uint32_t>(p.draw), s);
}

inline void sample_rows(const SampleParams& p) { parallel_items(p.R, p.R * (p.V + 200), sample_item, const_cast<SampleParams*>(&p)); }
