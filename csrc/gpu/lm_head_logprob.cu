// lm_head_logprob / gpu: online softmax over chunks of logits, target logit, top n; d_logits for the backward; the loop over products
// Contract   include/glmx/ops.h LmHeadLogprobParams   Oracle reference/lm_head_logprob.py   Doc docs/ops/lm_head_logprob.md
// Shapes     logits [rows, columns] f32 | maxima, sums [rows, chunks] | state [rows] | top [T, n] | backward: [groups, rows, width]
// Layout     lm_head_logprob.h says what is in memory at a time
// Numerics   the CPU's tree (cpu/inl/lm_head_logprob.inl): sixteen lanes a chunk, folded; chunks in order in fp64. The largest logit so
//            far is a maximum, whose order cannot show, so all chunks of a row are summed at once: only fp64's chain over them is serial.
//            Of the products, those of bf16 have the bits of this chip's matrix units
// Algorithm  forward, for each block of tokens and slab of columns: grouped_gemm; a team for the maximum of a row's chunk; half a team for
//            its sum; a team for a row's state, its best n (which looks only into chunks that have something better) and its results.
//            Backward: tokens with a gradient are listed on the device; for each block of them and group of chunks grouped_gemm, d_logits
//            by teams, dgrad, the sum of its parts, wgrad. Nothing is read back: blocks behind the last listed token have no rows
// Work/bytes about 60 instructions for 32 logits beside the products' 2*T*V*H flop
// Measured   ran on an H200 (docs/gpu.md), not timed there
// Limits     sizes are checked in ops/lm_head_logprob.cpp; an id outside [-1, V) ends the stream with an error

#include "gpu/lm_head_logprob.h"

#include "gpu/bits.h"
#include "gpu/gx/gx.h"
#include "gpu/gx/math.h"
#include "gpu/kernels.h"

namespace glmx::gpu {
namespace {

constexpr int kThreads = 256, kTeams = kThreads / gx::kTeam, kHalves = kThreads / gx::kRowLanes;

__device__ inline float infinity() { return gx::from_bits(0x7f800000u); }

// A slab of the vocabulary for some tokens.
struct Slab {
  const float* logits;  // [rows, columns]: columns [first, first + columns)
  float* maxima;        // [rows, chunks]
  float* sums;          // [rows, chunks]
  LmHeadState* state;   // [rows]
  const int64_t* ids;   // [rows]
  float* logprob;       // [rows]
  float* lse;           // [rows]
  int32_t* top_ids;     // [rows, top_n]
  float* top_values;    // [rows, top_n]: tempered logits, after the last slab log-probs
  int64_t rows, columns, chunks, first, V, top_n;
  float inverse_temperature;
};

__device__ inline int64_t chunk_width(const Slab& s, int64_t chunk) {
  const int64_t rest = s.columns - chunk * kLmHeadChunk;
  return rest < kLmHeadChunk ? rest : kLmHeadChunk;
}

// A team for each chunk of a row.
__global__ void __launch_bounds__(kThreads) chunk_maxima(const Slab s) {
  const int64_t item = int64_t{blockIdx.x} * kTeams + gx::team();
  const bool valid = item < s.rows * s.chunks;
  const int64_t row = valid ? item / s.chunks : 0, chunk = valid ? item % s.chunks : 0, n = chunk_width(s, chunk);
  const float* logits = s.logits + row * s.columns + chunk * kLmHeadChunk;
  float highest = -infinity();
#pragma unroll 8
  for (int64_t i = gx::lane(); i < n; i += gx::kTeam) highest = fmaxf(highest, logits[i] * s.inverse_temperature);
  for (int mask = gx::kTeam / 2; mask > 0; mask /= 2) highest = fmaxf(highest, gx::shuffle_xor(highest, mask));
  if (valid && gx::lane() == 0) s.maxima[item] = highest;
}

// Half a team for each chunk of a row: the sum of e^(z - peak), peak the largest z of the row up to and with this chunk.
__global__ void __launch_bounds__(kThreads) chunk_sums(const Slab s) {
  const int64_t item = int64_t{blockIdx.x} * kHalves + threadIdx.x / gx::kRowLanes;
  const int lane = gx::lane() % gx::kRowLanes;
  const bool valid = item < s.rows * s.chunks;
  const int64_t row = valid ? item / s.chunks : 0, chunk = valid ? item % s.chunks : 0, n = chunk_width(s, chunk);
  float peak = s.first == 0 ? -infinity() : s.state[row].max;
  for (int64_t c = lane; c <= chunk; c += gx::kRowLanes) peak = fmaxf(peak, s.maxima[row * s.chunks + c]);
  for (int mask = gx::kRowLanes / 2; mask > 0; mask /= 2) peak = fmaxf(peak, gx::shuffle_xor(peak, mask));
  const float* logits = s.logits + row * s.columns + chunk * kLmHeadChunk;
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t i = lane; i < n; i += gx::kRowLanes) sum = sum + gx::exp_below_88(logits[i] * s.inverse_temperature - peak);
  sum = gx::fold_add(sum);
  if (valid && lane == 0) s.sums[item] = sum;
}

// The best n of a row so far, descending, in global memory; the whole team works on it.
struct Top {
  int32_t* ids;
  float* values;
  int64_t n, kept;
  float least;  // the n-th best; only with kept == n

  // Whether a new value belongs to the best n. Columns come in ascending order, so a tie stays behind its elders.
  __device__ bool takes(float value) const { return kept < n || least < value; }
  __device__ void read_least() {
    if (kept == n) least = values[n - 1];
  }
  // Everything behind the new value moves by one place, from the end, 32 places at a time.
  __device__ void insert(float value, int32_t id) {
    const int64_t old = kept;
    kept = kept < n ? kept + 1 : n;
    const auto behind = [&](int64_t i) { return i >= old || values[i] < value; };
    bool more = true;
    for (int64_t strip = (kept - 1) / gx::kTeam * gx::kTeam; more; strip -= gx::kTeam) {
      const int64_t i = strip + gx::lane();
      const bool moves = i < kept && behind(i), shifted = moves && i > 0 && behind(i - 1);
      const float new_value = shifted ? values[i - 1] : value;
      const int32_t new_id = shifted ? ids[i - 1] : id;
      gx::team_barrier();
      if (moves) {
        values[i] = new_value;
        ids[i] = new_id;
      }
      more = (gx::ballot(shifted) & 1u) != 0;  // the strip's first place was filled from the strip before
    }
    gx::team_barrier();
    read_least();
  }
};

__device__ void scan_top(const Slab& s, int64_t row, const float* logits) {
  const int64_t kept = s.first < s.top_n ? s.first : s.top_n;
  Top top{s.top_ids + row * s.top_n, s.top_values + row * s.top_n, s.top_n, kept, 0.0f};
  top.read_least();
  for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
    if (!top.takes(s.maxima[row * s.chunks + chunk])) continue;
    const int64_t n = chunk_width(s, chunk), begin = chunk * kLmHeadChunk;
    constexpr int kAhead = 4;
    for (int64_t i = 0; i < n; i += kAhead * gx::kTeam) {
      float z[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int64_t at = i + u * gx::kTeam + gx::lane();
        const float tempered = at < n ? logits[begin + at] * s.inverse_temperature : 0.0f;
        z[u] = tempered == tempered ? tempered : -infinity();
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int64_t at = i + u * gx::kTeam;
        uint32_t better = gx::ballot(at + gx::lane() < n && top.takes(z[u]));
        for (; better != 0; better &= better - 1) {
          const int lane = lowest_bit(better);
          const float value = gx::shuffle(z[u], lane);
          if (top.takes(value)) top.insert(value, static_cast<int32_t>(s.first + begin + at + lane));
        }
      }
    }
  }
}

// A team for each row: the chunks into its state, in order; after the last slab its results.
__global__ void __launch_bounds__(kThreads) advance_rows(const Slab s) {
  const int64_t item = int64_t{blockIdx.x} * kTeams + gx::team();
  if (item >= s.rows) return;  // the whole team
  const float* logits = s.logits + item * s.columns;
  LmHeadState state = s.first == 0 ? LmHeadState{-infinity(), 0.0f, 0.0} : s.state[item];
  for (int64_t begin = 0; begin < s.chunks; begin += gx::kTeam) {
    const int64_t own = begin + gx::lane() < s.chunks ? begin + gx::lane() : s.chunks - 1;
    const float maximum = s.maxima[item * s.chunks + own], part = s.sums[item * s.chunks + own];
    for (int i = 0; i < gx::kTeam && begin + i < s.chunks; ++i) {
      const float chunk_max = gx::shuffle(maximum, i), sum = gx::shuffle(part, i);
      if (state.max < chunk_max) {
        state.sum = state.sum * static_cast<double>(gx::exp(state.max - chunk_max));
        state.max = chunk_max;
      }
      state.sum = state.sum + static_cast<double>(sum);
    }
  }
  const int64_t id = s.ids[item], target = id - s.first;
  gx::require(id >= -1 && id < s.V);
  if (target >= 0 && target < s.columns) state.target = logits[target] * s.inverse_temperature;
  if (s.top_n > 0) scan_top(s, item, logits);
  if (s.first + s.columns < s.V) {
    if (gx::lane() == 0) s.state[item] = state;
    return;
  }
  const double peak = static_cast<double>(state.max), log_sum = gx::log64(state.sum);
  if (gx::lane() == 0) {
    s.lse[item] = static_cast<float>(peak + log_sum);
    s.logprob[item] = id < 0 ? 0.0f : static_cast<float>((static_cast<double>(state.target) - peak) - log_sum);
  }
  gx::team_barrier();
  for (int64_t i = gx::lane(); i < s.top_n; i += gx::kTeam) {
    float* value = s.top_values + item * s.top_n + i;
    *value = static_cast<float>((static_cast<double>(*value) - peak) - log_sum);
  }
}

// Whether a number is not zero, a denormal too.
__device__ inline bool not_zero(float f) { return (gx::to_bits(f) & 0x7fffffffu) != 0; }

// The tokens with a gradient, in order; one block.
constexpr int kListThreads = 1024, kListTeams = kListThreads / gx::kTeam;
__global__ void __launch_bounds__(kListThreads) list_tokens(const LmHeadLogprobBackwardParams p, int32_t* tokens, int32_t* active) {
  __shared__ int32_t counts[kListTeams];
  int32_t listed = 0;
  for (int64_t begin = 0; begin < p.T; begin += kListThreads) {
    const int64_t t = begin + threadIdx.x;
    const int64_t id = t < p.T ? p.ids[t] : -1;
    gx::require(id >= -1 && id < p.V);
    const bool own = t < p.T && ((id >= 0 && not_zero(p.d_logprob[t])) || (p.d_lse != nullptr && not_zero(p.d_lse[t])));
    const uint32_t mask = gx::ballot(own);
    if (gx::lane() == 0) counts[gx::team()] = count_bits(mask);
    gx::barrier();
    int32_t before = listed;
    for (int w = 0; w < kListTeams; ++w) {
      before += w < gx::team() ? counts[w] : 0;
      listed += counts[w];
    }
    if (own) tokens[before + count_bits(mask & bits_below(gx::lane()))] = static_cast<int32_t>(t);
    gx::barrier();
  }
  if (threadIdx.x == 0) *active = listed;
}

// A block of listed tokens by some chunks.
struct Group {
  const int32_t* tokens;  // [T]
  const int32_t* active;  // [1]
  int64_t begin, rows;    // the block's listed tokens: [begin, begin + rows), as far as there are any
  int64_t groups, width, first;

  __device__ int64_t count() const {
    const int64_t left = *active - begin;
    return left < 0 ? 0 : left < rows ? left : rows;
  }
};

__global__ void __launch_bounds__(kThreads) fill_gather(const Group g, int32_t* gather, int32_t* offsets) {
  const int64_t n = g.count(), i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i <= g.groups) offsets[i] = static_cast<int32_t>(i * n);
  if (i < g.groups * n) gather[i] = g.tokens[g.begin + i % n];
}

// d_z = (d_logprob * (1[v == id] - p) + d_lse * p) / temperature with p = e^(z - lse); a team for each row of each chunk.
template <class T>
__global__ void __launch_bounds__(kThreads)
    d_logits_rows(const Group g, const LmHeadLogprobBackwardParams p, const float* logits, T* out, float inverse_temperature) {
  const int64_t n = g.count(), item = int64_t{blockIdx.x} * kTeams + gx::team();
  if (item >= g.groups * n) return;
  const int64_t t = g.tokens[g.begin + item % n], id = p.ids[t];
  const int64_t target = id < 0 ? -1 : id - (g.first + item / n * g.width);
  const float d_logprob = id < 0 ? 0.0f : p.d_logprob[t], d_lse = p.d_lse == nullptr ? 0.0f : p.d_lse[t];
  const float minus_lse = -p.lse[t], scale = (d_lse - d_logprob) * inverse_temperature;
  logits += item * g.width;
  out += item * g.width;
#pragma unroll 4
  for (int64_t i = gx::lane(); i < g.width; i += gx::kTeam) {
    const float probability = gx::exp_below_88(gx::fma(logits[i], inverse_temperature, minus_lse));
    const float own = gx::fma(d_lse, probability, d_logprob * (1.0f - probability)) * inverse_temperature;
    gx::store(out + i, i == target ? own : probability * scale);
  }
}

// d_hidden[token] = d_hidden[token] + parts[0] + parts[1] + ..., in this order. A grid of [rows, parts of H].
__global__ void __launch_bounds__(kThreads) add_parts(const Group g, const float* parts, float* d_hidden, int64_t H) {
  const int64_t n = g.count(), row = blockIdx.x, column = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  if (row >= n || column >= H) return;
  float* out = d_hidden + g.tokens[g.begin + row] * H + column;
  float sum = *out;
#pragma unroll 4
  for (int64_t group = 0; group < g.groups; ++group) sum = sum + parts[(group * n + row) * H + column];
  *out = sum;
}

const void* rows_from(const void* tensor, int64_t row, int64_t columns, DType dtype) {
  return static_cast<const char*>(tensor) + row * columns * dtype_size(dtype);
}
dim3 blocks_for(int64_t items, int each) { return dim3(static_cast<unsigned>((items + each - 1) / each)); }

}  // namespace

void lm_head_logprob(const LmHeadLogprobParams& p) {
  const LmHeadForwardPlan plan = lm_head_plan(p, p.workspace);
  // A last chunk that is no multiple of eight is a slab of its own: grouped_gemm chooses its kernel by the alignment of N, and which one
  // makes a column's logit must not depend on how many columns are made at once.
  const int64_t smooth = p.V % 8 == 0 ? p.V : p.V / kLmHeadChunk * kLmHeadChunk;
  for (int64_t t = 0; t < p.T; t += plan.rows) {
    const int64_t rows = std::min(plan.rows, p.T - t);
    for (int64_t v = 0, columns = 0; v < p.V; v += columns) {
      columns = std::min(plan.columns, (v < smooth ? smooth : p.V) - v);
      GroupedGemmParams gemm{};
      gemm.x = rows_from(p.hidden, t, p.H, p.dtype);
      gemm.w = rows_from(p.weight, v, p.H, p.dtype);
      gemm.out = plan.logits;
      gemm.M = gemm.R = rows;
      gemm.N = columns;
      gemm.K = p.H;
      gemm.E = 1;
      gemm.dtype = p.dtype;
      gemm.out_dtype = DType::f32;
      gemm.device = p.device;
      gpu::grouped_gemm(gemm);

      Slab s{};
      s.logits = plan.logits;
      s.maxima = plan.maxima;
      s.sums = plan.sums;
      s.state = plan.state;
      s.ids = p.ids + t;
      s.logprob = p.logprob + t;
      s.lse = p.lse + t;
      if (p.top_n > 0) {
        s.top_ids = p.top_ids + t * p.top_n;
        s.top_values = p.top_logprobs + t * p.top_n;
      }
      s.rows = rows;
      s.columns = columns;
      s.chunks = (columns + kLmHeadChunk - 1) / kLmHeadChunk;
      s.first = v;
      s.V = p.V;
      s.top_n = p.top_n;
      s.inverse_temperature = 1.0f / p.temperature;
      gx::launch("lm_head_logprob (maxima)", chunk_maxima, blocks_for(rows * s.chunks, kTeams), kThreads, 0, p.device, s);
      gx::launch("lm_head_logprob (sums)", chunk_sums, blocks_for(rows * s.chunks, kHalves), kThreads, 0, p.device, s);
      gx::launch("lm_head_logprob (rows)", advance_rows, blocks_for(rows, kTeams), kThreads, 0, p.device, s);
    }
  }
}

void lm_head_logprob_backward(const LmHeadLogprobBackwardParams& p) {
  const char* const name = "lm_head_logprob_backward";
  const LmHeadBackwardPlan plan = lm_head_plan(p, p.workspace);
  const float inverse_temperature = 1.0f / p.temperature;
  if (p.d_hidden != nullptr) gx::fill_zero(name, p.d_hidden, static_cast<size_t>(p.T * p.H) * sizeof(float), p.device);
  if (p.T == 0) {
    if (p.d_weight != nullptr && !p.accumulate) gx::fill_zero(name, p.d_weight, static_cast<size_t>(p.V * p.H) * sizeof(float), p.device);
    return;
  }
  gx::launch("lm_head_logprob_backward (tokens)", list_tokens, dim3(1), kListThreads, 0, p.device, p, plan.tokens, plan.active);

  for (int64_t begin = 0; begin < p.T; begin += plan.rows) {
    Group g{plan.tokens, plan.active, begin, plan.rows, plan.groups, 0, 0};
    gx::launch("lm_head_logprob_backward (gather)", fill_gather, blocks_for(plan.groups * plan.rows + 1, kThreads), kThreads, 0, p.device,
               g, plan.gather, plan.offsets);
    for (int64_t v = 0; v < p.V; v += g.groups * kLmHeadChunk) {
      g.width = std::min(kLmHeadChunk, p.V - v);
      g.groups = std::clamp<int64_t>((p.V - v) / kLmHeadChunk, 1, plan.groups);
      g.first = v;
      const void* weight = rows_from(p.weight, v, p.H, p.dtype);

      GroupedGemmParams gemm{};
      gemm.x = p.hidden;
      gemm.w = weight;
      gemm.expert_offsets = plan.offsets;
      gemm.row_token = plan.gather;
      gemm.out = plan.logits;
      gemm.M = p.T;
      gemm.R = g.groups * g.rows;
      gemm.N = g.width;
      gemm.K = p.H;
      gemm.E = g.groups;
      gemm.dtype = p.dtype;
      gemm.out_dtype = DType::f32;
      gemm.device = p.device;
      gpu::grouped_gemm(gemm);
      const dim3 grid = blocks_for(g.groups * g.rows, kTeams);
      if (p.dtype == DType::bf16) {
        gx::launch("lm_head_logprob_backward (d_logits)", d_logits_rows<uint16_t>, grid, kThreads, 0, p.device, g, p, plan.logits,
                   static_cast<uint16_t*>(plan.d_logits), inverse_temperature);
      } else {
        gx::launch("lm_head_logprob_backward (d_logits)", d_logits_rows<float>, grid, kThreads, 0, p.device, g, p, plan.logits,
                   static_cast<float*>(plan.d_logits), inverse_temperature);
      }
      if (p.d_hidden != nullptr) {
        GroupedGemmDgradParams dgrad{};
        dgrad.dy = plan.d_logits;
        dgrad.w = weight;
        dgrad.expert_offsets = plan.offsets;
        dgrad.dx = plan.parts;
        dgrad.R = g.groups * g.rows;
        dgrad.N = g.width;
        dgrad.K = p.H;
        dgrad.E = g.groups;
        dgrad.dtype = p.dtype;
        dgrad.out_dtype = DType::f32;
        dgrad.device = p.device;
        gpu::grouped_gemm_dgrad(dgrad);
        const dim3 tiles(static_cast<unsigned>(g.rows), static_cast<unsigned>((p.H + kThreads - 1) / kThreads));
        gx::launch("lm_head_logprob_backward (add)", add_parts, tiles, kThreads, 0, p.device, g, plan.parts, p.d_hidden, p.H);
      }
      if (p.d_weight != nullptr) {
        GroupedGemmWgradParams wgrad{};
        wgrad.dy = plan.d_logits;
        wgrad.x = p.hidden;
        wgrad.expert_offsets = plan.offsets;
        wgrad.row_token = plan.gather;
        wgrad.dw = p.d_weight + v * p.H;
        wgrad.M = p.T;
        wgrad.R = g.groups * g.rows;
        wgrad.N = g.width;
        wgrad.K = p.H;
        wgrad.E = g.groups;
        wgrad.dtype = p.dtype;
        wgrad.out_dtype = DType::f32;
        wgrad.accumulate = p.accumulate || begin > 0;
        wgrad.device = p.device;
        gpu::grouped_gemm_wgrad(wgrad);
      }
    }
  }
}

}  // namespace glmx::gpu
