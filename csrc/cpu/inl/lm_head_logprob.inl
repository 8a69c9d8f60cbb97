// lm_head_logprob: online softmax over chunks of logits, target logit, top n; d_logits for the backward. The GEMMs are the host loop's
// Contract   include/glmx/ops.h LmHeadLogprobParams   Oracle reference/lm_head_logprob.py   Doc docs/ops/lm_head_logprob.md
// Shapes     logits [rows, columns] f32 | state [rows] | top [rows, n] | backward: logits, d_logits [groups, rows, width]
// Layout     a chunk of one row (4 KB) is read twice, the second time from L1; the last lanes of a chunk that do not exist count as -inf
// Numerics   per chunk of kLmHeadChunk columns: maximum, then sum of exp16(z - max) in 16 lanes, folded; chunks in order, their sums in
//            fp64, rescaled by exp16 when the maximum grows. log64 at the end; logprob = (z - max) - log(sum) in fp64, one rounding.
//            A token sees its own row alone, so X2 holds for any grouping of tokens or columns into calls
// Algorithm  one work item = 16 rows (forward) or 4 rows of a chunk (backward)
// Work/bytes about 25*T*V flop beside the GEMM's 2*T*V*H
// Measured   0.6 ns per logit forward, one AVX-512 thread of a shared Zen 4 machine (about 8 % of the op at H = 256)
// Limits     host checks in ops/lm_head_logprob.cpp
#include "cpu/inl/math64.inl"
#include "cpu/inl/rows.inl"
#include "cpu/inl/vec_math.inl"

constexpr int64_t kScanRows = 16, kGradRows = 4;

// Tempered logits [i, i + 16) of a row of n; -inf past its end.
inline V16 tempered(const float* row, int64_t i, int64_t n, V16 inverse_temperature) {
  if (i + 16 <= n) return mul(load(row + i), inverse_temperature);
  alignas(64) const float lane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const V16 z = mul(load_n(row + i, lanes(n - i)), inverse_temperature);
  return select_lt(load(lane), set1(static_cast<float>(n - i)), z, set1(-__builtin_inff()));
}

inline float exp_scalar(float x) {
  float lane[16];
  store(lane, exp16(set1(x)));
  return lane[0];
}

inline void scan_chunk(LmHeadState& state, const float* row, int64_t n, V16 inverse_temperature) {
  V16 highest = set1(-__builtin_inff());
  for (int64_t i = 0; i < n; i += 16) highest = max(highest, tempered(row, i, n, inverse_temperature));
  const float chunk_max = fold_max(highest);
  if (state.max < chunk_max) {
    state.sum = state.sum * static_cast<double>(exp_scalar(state.max - chunk_max));
    state.max = chunk_max;
  }
  const V16 peak = set1(state.max);
  V16 sum = zero();
  for (int64_t i = 0; i < n; i += 16) sum = add(sum, exp16_below_88(sub(tempered(row, i, n, inverse_temperature), peak)));
  state.sum = state.sum + static_cast<double>(fold_add(sum));
}

// Keeps the best `top_n` of the columns seen so far, descending. Columns come in ascending order, so a tie stays behind its elders.
inline void scan_top(const LmHeadScan& p, const float* row, int32_t* top_ids, float* top_values) {
  const V16 inverse_temperature = set1(p.inverse_temperature);
  int64_t kept = min_i64(p.first, p.top_n);
  for (int64_t i = 0; i < p.columns; i += 16) {
    const V16 z = tempered(row, i, p.columns, inverse_temperature);
    if (kept == p.top_n && mask_lt(set1(top_values[kept - 1]), z) == 0) continue;
    float lane[16];
    store(lane, z);
    for (int64_t j = 0; j < min_i64(16, p.columns - i); ++j) {
      const float value = lane[j] == lane[j] ? lane[j] : -__builtin_inff();
      if (kept == p.top_n && !(top_values[kept - 1] < value)) continue;
      int64_t at = kept < p.top_n ? kept++ : kept - 1;
      for (; at > 0 && top_values[at - 1] < value; --at) {
        top_values[at] = top_values[at - 1];
        top_ids[at] = top_ids[at - 1];
      }
      top_values[at] = value;
      top_ids[at] = static_cast<int32_t>(p.first + i + j);
    }
  }
}

inline void scan_rows(void* context, int64_t block) {
  const LmHeadScan& p = *static_cast<const LmHeadScan*>(context);
  const V16 inverse_temperature = set1(p.inverse_temperature);
  const int64_t end = min_i64(p.rows, (block + 1) * kScanRows);
  for (int64_t t = block * kScanRows; t < end; ++t) {
    const float* row = p.logits + t * p.columns;
    LmHeadState& state = p.state[t];
    if (p.first == 0) state = {-__builtin_inff(), 0.0f, 0.0};
    for (int64_t c = 0; c < p.columns; c += p.chunk) scan_chunk(state, row + c, min_i64(p.chunk, p.columns - c), inverse_temperature);
    const int64_t target = p.ids[t] - p.first;
    if (target >= 0 && target < p.columns) state.target = row[target] * p.inverse_temperature;
    if (p.top_n > 0) scan_top(p, row, p.top_ids + t * p.top_n, p.top_values + t * p.top_n);
  }
}

inline void scan(const LmHeadScan& p) {
  parallel_items((p.rows + kScanRows - 1) / kScanRows, p.rows * p.columns, scan_rows, const_cast<LmHeadScan*>(&p));
}

inline void finish_rows(void* context, int64_t block) {
  const LmHeadFinish& p = *static_cast<const LmHeadFinish*>(context);
  const int64_t end = min_i64(p.rows, (block + 1) * kScanRows);
  for (int64_t t = block * kScanRows; t < end; ++t) {
    const LmHeadState& state = p.state[t];
    const double peak = static_cast<double>(state.max), log_sum = log64(state.sum);
    p.lse[t] = static_cast<float>(peak + log_sum);
    p.logprob[t] = p.ids[t] < 0 ? 0.0f : static_cast<float>((static_cast<double>(state.target) - peak) - log_sum);
    for (int64_t i = t * p.top_n; i < (t + 1) * p.top_n; ++i)
      p.top_values[i] = static_cast<float>((static_cast<double>(p.top_values[i]) - peak) - log_sum);
  }
}

inline void finish(const LmHeadFinish& p) {
  parallel_items((p.rows + kScanRows - 1) / kScanRows, p.rows * (50 + p.top_n), finish_rows, const_cast<LmHeadFinish*>(&p));
}

// d_z = (d_logprob * (1[v == id] - p) + d_lse * p) / temperature with p = e^(z - lse).
template <class T>
void d_logits_row(const LmHeadDlogits& p, int64_t group, int64_t r) {
  const int64_t t = p.row_token[r], offset = (group * p.rows + r) * p.width;
  const float* row = p.logits + offset;
  T* out = static_cast<T*>(p.d_logits) + offset;
  const int64_t target = p.ids[t] - (p.first + group * p.width);
  const float d_logprob = p.ids[t] < 0 ? 0.0f : p.d_logprob[t], d_lse = p.d_lse == nullptr ? 0.0f : p.d_lse[t];
  const V16 inverse_temperature = set1(p.inverse_temperature), minus_lse = set1(-p.lse[t]);
  const V16 scale = set1((d_lse - d_logprob) * p.inverse_temperature);
  for (int64_t i = 0; i < p.width; i += 16) {
    const int n = lanes(p.width - i);
    const V16 probability = exp16_below_88(fma(load_n(row + i, n), inverse_temperature, minus_lse));
    store_n(out + i, mul(probability, scale), n);
  }
  if (p.ids[t] < 0 || target < 0 || target >= p.width) return;
  const V16 probability = exp16_below_88(fma(set1(row[target]), inverse_temperature, minus_lse));
  const V16 own = fma(set1(d_lse), probability, mul(set1(d_logprob), sub(set1(1.0f), probability)));
  store_n(out + target, mul(own, inverse_temperature), 1);
}

template <class T>
void d_logits_rows(void* context, int64_t block) {
  const LmHeadDlogits& p = *static_cast<const LmHeadDlogits*>(context);
  const int64_t end = min_i64(p.groups * p.rows, (block + 1) * kGradRows);
  for (int64_t i = block * kGradRows; i < end; ++i) d_logits_row<T>(p, i / p.rows, i % p.rows);
}

inline void d_logits(const LmHeadDlogits& p) {
  parallel_items((p.groups * p.rows + kGradRows - 1) / kGradRows, p.groups * p.rows * p.width,
                 p.dtype == DType::bf16 ? d_logits_rows<uint16_t> : d_logits_rows<float>, const_cast<LmHeadDlogits*>(&p));
}

inline void add_rows(void* context, int64_t block) {
  const LmHeadAdd& p = *static_cast<const LmHeadAdd*>(context);
  const int64_t end = min_i64(p.rows, (block + 1) * kScanRows);
  for (int64_t r = block * kScanRows; r < end; ++r) {
    float* out = p.out + p.row_token[r] * p.H;
    for (int64_t i = 0; i < p.H; i += 16) {
      const int n = lanes(p.H - i);
      fetch_ahead(out + i);
      V16 sum = load_n(out + i, n);
      for (int64_t group = 0; group < p.groups; ++group) {
        const float* part = p.parts + (group * p.rows + r) * p.H + i;
        fetch_ahead(part);
        sum = add(sum, load_n(part, n));
      }
      store_n(out + i, sum, n);
    }
  }
}

inline void add_parts(const LmHeadAdd& p) {
  parallel_items((p.rows + kScanRows - 1) / kScanRows, (p.groups + 2) * p.rows * p.H / 8, add_rows, const_cast<LmHeadAdd*>(&p));
}
