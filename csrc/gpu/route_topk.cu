// route_topk / gpu: sigmoid scores, a biased selection inside the best groups, normalised weights, counts; backward to the logits
// Contract   include/glmx/ops.h RouteTopkParams   Oracle reference/route_topk.py   Doc docs/ops/route_topk.md
// Shapes     logits, scores, d_scores, d_logits [T,E] f32 | bias [E] f32 | topk_weights [T,K] f32 | topk_ids [T,K] i32 | counts [E] i32
// Layout     row-major, any E <= 512. Quads: four neighbouring experts; lane l of a token's L lanes owns quads l, l + L, l + 2 L, ...
// Numerics   the CPU's trees (cpu/inl/route_topk.inl): exact scores, IEEE comparisons, ties to the lower id, the sum of weights in the
//            order of k by one chain. Counts are integers, so the order of their additions cannot show
// Algorithm  L lanes serve a token: 8 where there are many tokens and E is 128, 160 or 256, so that every step across lanes is paid once
// for
//            four tokens of a team; else 32, so that a token is done soon. Biased scores lie in shared memory, the maxima of a lane's quads
//            in registers. A round takes the maximum over lanes; the lane that has it (of several, the one with the lowest id) marks the
//            value as taken (NaN) and looks again at one quad alone. Only ties cost more
//            Counts begin as zeros of a launch of its own, which this one runs beside and waits for at its end.
//            Groups are scored and masked between scores and selection, and only with 32 lanes. Counts gather in shared memory first.
//            Backward: a team serves a token; its row of gradients lies in shared memory, where the chosen ones are added in order
// Work/bytes about 30 instructions an expert and 60 a round for each team; 4*T*E bytes in: bound by issue
// Measured   H200: 7.9, 9.2 and 10.9 us for 8192 tokens of 128, 160 and 256 experts, K = 8, 3.7 to 3.9 us for one token: a tenth and a
//            fifth of torch's sigmoid and topk. About 490 instructions a token and scheduler, issued in 54 % of the cycles
// Limits     sizes are checked in ops/route_topk.cpp, topk_ids of the backward here too

#include "gpu/bits.h"
#include "gpu/gx/gx.h"
#include "gpu/gx/math.h"
#include "gpu/kernels.h"

namespace glmx::gpu {
namespace {

constexpr int kThreads = 256, kTeams = kThreads / gx::kTeam;
constexpr int kMaxExperts = 512;  // ops.h
// From here on teams of four tokens fill a card of 132 multiprocessors (8 teams each) better than teams of one.
constexpr int64_t kManyTokens = 4096;
constexpr int kNoExpert = 1 << 20;

struct alignas(16) Quad {
  float v[4];
};

__device__ inline float infinity() { return gx::from_bits(0x7f800000u); }
__device__ inline float taken() { return gx::from_bits(0x7fffffffu); }  // NaN: fmaxf passes it over and it equals nothing

// gx::sigmoid's bits in fewer steps: between these bounds 2^n is one number, and outside of them nothing is lost. 1 + e^-87 is 1, and
// from 88 on 1 / (1 + e^88) is denormal, flushed to the same 0 as 1 / infinity.
__device__ inline float sigmoid(float x) {
  float clamped = 0.0f - x;
  clamped = clamped < gx::kLowestExp ? gx::kLowestExp : clamped;
  clamped = 88.0f < clamped ? 88.0f : clamped;
  const gx::ExpParts e = gx::exp_parts(clamped);
  return gx::reciprocal(1.0f + e.y * gx::pow2(e.n.value));
}

__device__ inline float largest(const Quad& c) { return fmaxf(fmaxf(c.v[0], c.v[1]), fmaxf(c.v[2], c.v[3])); }

template <int Q>
__device__ inline float largest_of(const float (&quad)[Q]) {
  float v = quad[0];
#pragma unroll
  for (int q = 1; q < Q; ++q) v = fmaxf(v, quad[q]);
  return v;
}

// Values [first, first + 4) of a row of n; zeros past its end. `aligned`: to 16 bytes, and n is a multiple of four.
__device__ inline Quad load_quad(const float* row, int first, int n, bool aligned) {
  if (aligned && first < n) {
    const gx::Vec16 v = gx::load16(row + first);
    return {{gx::from_bits(v.word[0]), gx::from_bits(v.word[1]), gx::from_bits(v.word[2]), gx::from_bits(v.word[3])}};
  }
  Quad c;
  for (int j = 0; j < 4; ++j) c.v[j] = first + j < n ? row[first + j] : 0.0f;
  return c;
}

__device__ inline void store_quad(float* row, int first, int n, bool aligned, const Quad& c) {
  if (aligned && first < n) {
    return gx::store16(row + first, {{gx::to_bits(c.v[0]), gx::to_bits(c.v[1]), gx::to_bits(c.v[2]), gx::to_bits(c.v[3])}});
  }
  for (int j = 0; j < 4; ++j) {
    if (first + j < n) row[first + j] = c.v[j];
  }
}

// Over the L lanes of a token.
template <int L>
__device__ inline float fold_max(float v) {
  for (int mask = L / 2; mask > 0; mask /= 2) v = fmaxf(v, gx::shuffle_xor(v, mask));
  return v;
}
template <int L>
__device__ inline int fold_lowest(int index) {
  for (int mask = L / 2; mask > 0; mask /= 2) {
    const int other = gx::shuffle_xor(index, mask);
    index = other < index ? other : index;
  }
  return index;
}

// Experts outside the best topk_group groups get -inf. A group's score is the sum of its two largest values; its rank is the number of
// groups that come before it.
__device__ void mask_groups(const RouteTopkParams& p, float* value, float* score) {
  const int groups = static_cast<int>(p.n_group), size = static_cast<int>(p.E / p.n_group), keep = static_cast<int>(p.topk_group);
  const float lowest = -infinity();
  gx::team_barrier();
  for (int g = gx::lane(); g < groups; g += gx::kTeam) {
    float first = lowest, second = lowest;
    for (int j = 0; j < size; ++j) {
      const float v = value[g * size + j];
      const float lower = first < v ? first : v;
      second = second < lower ? lower : second;
      first = first < v ? v : first;
    }
    const float sum = size == 1 ? first : first + second;
    score[g] = sum == sum ? sum : lowest;  // inf - inf
  }
  gx::team_barrier();
  for (int g = gx::lane(); g < groups; g += gx::kTeam) {
    const float own = score[g];
    int rank = 0;
    for (int i = 0; i < groups; ++i) rank += own < score[i] || (own == score[i] && i < g) ? 1 : 0;
    if (rank < keep) continue;
    for (int j = 0; j < size; ++j) value[g * size + j] = lowest;
  }
  gx::team_barrier();
}

// L lanes a token, Q quads a lane. With fewer than 32 lanes E is 4 * L * Q and rows are aligned.
template <int L, int Q>
__global__ void __launch_bounds__(kThreads) route_kernel(const RouteTopkParams p, bool aligned_rows) {
  constexpr bool kFast = L < gx::kTeam;
  constexpr int kTokens = kThreads / L;
  __shared__ Quad rows[kTokens][L * Q];
  __shared__ float group_scores[kFast ? 1 : kTeams][kFast ? 1 : kMaxExperts];
  __shared__ int32_t counts[kMaxExperts], chosen[kTokens][L];
  const int E = kFast ? 4 * L * Q : static_cast<int>(p.E), K = static_cast<int>(p.K);
  const bool aligned = kFast || aligned_rows;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % L, first_lane = gx::lane() / L * L;
  const int64_t item = int64_t{blockIdx.x} * kTokens + thread / L;
  const bool valid = item < p.T;
  const int64_t t = valid ? item : p.T - 1;  // lanes without a token follow the last one's and write nothing
  const float* logits = p.logits + t * E;
  Quad* row = rows[thread / L];
#pragma unroll 1
  for (int e = thread; e < E; e += kThreads) counts[e] = 0;
  gx::barrier();

  Quad x[Q], bias[Q];  // all loads are on their way before the first score: its division branches, and loads do not move across
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    x[q] = load_quad(logits, 4 * (q * L + lane), E, aligned);
    bias[q] = load_quad(p.bias, 4 * (q * L + lane), E, aligned);
  }
  float quad[Q];
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    const int first = 4 * (q * L + lane);
    Quad s, c;
    for (int j = 0; j < 4; ++j) {
      s.v[j] = sigmoid(x[q].v[j]);
      c.v[j] = first + j < E ? fmaxf(s.v[j] + bias[q].v[j], -infinity()) : taken();  // NaN counts as -inf
    }
    if (p.scores != nullptr && valid) store_quad(p.scores + t * E, first, E, aligned, s);
    row[q * L + lane] = c;
    quad[q] = largest(c);
  }
  if constexpr (!kFast) {
    if (p.n_group > 1) {
      mask_groups(p, row[0].v, group_scores[thread / L]);
#pragma unroll
      for (int q = 0; q < Q; ++q) quad[q] = largest(row[q * L + lane]);
    }
  }
  float top = largest_of(quad);

  float sum = 0.0f, score = 0.0f;
  for (int begin = 0; begin < K; begin += L) {  // lane k gets the choice of round begin + k
    const int n = K - begin < L ? K - begin : L;
    for (int k = 0; k < n; ++k) {
      const float best = fold_max<L>(top);
      int at = 0, j = 0, index = kNoExpert;  // the first of this lane's elements that is the best: quad `at`, place j
      Quad c;
      if (top == best) {
#pragma unroll
        for (int q = Q - 1; q > 0; --q) at = quad[q] == best ? q : at;
        at = quad[0] == best ? 0 : at;
        c = row[at * L + lane];
        j = c.v[0] == best ? 0 : c.v[1] == best ? 1 : c.v[2] == best ? 2 : 3;
        index = 4 * (at * L + lane) + j;
      }
      // One lane of the token has the best, as a rule; where two have, of any token of the team, the lowest index decides.
      const uint32_t holders = (gx::ballot(top == best) >> first_lane) & (0xffffffffu >> (gx::kTeam - L));
      bool wins = top == best;
      if (gx::ballot((holders & (holders - 1)) != 0) != 0) wins = index == fold_lowest<L>(index);
      if (wins) {
        for (int i = 0; i < 4; ++i) c.v[i] = i == j ? taken() : c.v[i];
        row[at * L + lane] = c;
        const float rest = largest(c);
#pragma unroll
        for (int q = 0; q < Q; ++q) quad[q] = q == at ? rest : quad[q];
        top = largest_of(quad);
        chosen[thread / L][k] = index;
      }
    }
    gx::team_barrier();
    const int id = lane < n ? chosen[thread / L][lane] : 0;
    gx::team_barrier();  // the next strip writes them again
    score = sigmoid(logits[id]);
    for (int k = 0; k < n; ++k) sum = sum + gx::shuffle(score, first_lane + k);
    if (valid && lane < n) {
      p.topk_ids[t * K + begin + lane] = id;
      p.topk_weights[t * K + begin + lane] = score;
      gx::atomic_add(counts + id, 1);
    }
  }
  const float denominator = p.norm_topk_prob ? sum + 1e-20f : 1.0f;
  for (int begin = 0; begin < K; begin += L) {
    if (!valid || begin + lane >= K) continue;
    float* weight = p.topk_weights + t * K + begin + lane;
    const float s = begin + L >= K ? score : *weight;  // the last strip's are still at hand
    *weight = s / denominator * p.routed_scaling_factor;
  }

  gx::barrier();
  if (gridDim.x > 1) gx::wait_for_launches();  // for the zeros
  for (int e = thread; e < E; e += kThreads) {
    if (gridDim.x == 1) {
      p.expert_counts[e] = counts[e];
    } else if (counts[e] != 0) {
      gx::atomic_add(p.expert_counts + e, counts[e]);
    }
  }
}

__global__ void __launch_bounds__(kThreads) zero_counts(int32_t* counts, int E) {
  gx::let_next_begin();
  for (int e = static_cast<int>(threadIdx.x); e < E; e += kThreads) counts[e] = 0;
}

// With w = f * s / D, D = sum of s + 1e-20:  ds_k = f * (dw_k - (sum of dw * s) / D) / D;  without norm_topk_prob ds_k = f * dw_k.
// Pairs k, k + 16, ... of the token are those of lanes k and k + 16, as in "row sums" of ops.h.
__global__ void __launch_bounds__(kThreads) route_backward_kernel(const RouteTopkBackwardParams p) {
  __shared__ float rows[kTeams][kMaxExperts];
  const int E = static_cast<int>(p.E), K = static_cast<int>(p.K), lane = gx::lane(), own = lane % gx::kRowLanes;
  const int64_t item = int64_t{blockIdx.x} * kTeams + gx::team();
  const bool valid = item < p.T;
  const int64_t t = valid ? item : p.T - 1;
  const float* logits = p.logits + t * E;
  float* row = rows[gx::team()];
  for (int e = lane; e < E; e += gx::kTeam) row[e] = p.d_scores == nullptr ? 0.0f : p.d_scores[t * E + e] * gx::sigmoid_slope(logits[e]);
  if (p.d_topk_weights != nullptr) {
    const int32_t* ids = p.topk_ids + t * K;
    const float* d_weights = p.d_topk_weights + t * K;
    float dot = 0.0f, denominator = 1.0f;
    if (p.norm_topk_prob) {
      float sum = 0.0f;
      for (int begin = 0; begin < K; begin += gx::kRowLanes) {
        const int n = K - begin < gx::kRowLanes ? K - begin : gx::kRowLanes;
        const int k = begin + (own < n ? own : 0);
        gx::require(ids[k] >= 0 && ids[k] < E);
        const float s = gx::sigmoid(logits[ids[k]]);
        if (own < n) dot = gx::fma(d_weights[k], s, dot);
        for (int i = 0; i < n; ++i) sum = sum + gx::shuffle(s, i);
      }
      denominator = sum + 1e-20f;
      dot = gx::fold_add(dot) / denominator;
    }
    for (int begin = 0; begin < K; begin += gx::kRowLanes) {
      const int n = K - begin < gx::kRowLanes ? K - begin : gx::kRowLanes;
      const int k = begin + (own < n ? own : 0);
      const int id = ids[k];
      gx::require(id >= 0 && id < E);
      const float ds = p.routed_scaling_factor * ((d_weights[k] - dot) / denominator);
      const float d = ds * gx::sigmoid_slope(logits[id]);
      for (int i = 0; i < n; ++i) {  // one after the other, in order: nothing forbids an id twice
        gx::team_barrier();
        if (lane == i) row[id] = row[id] + d;
      }
    }
  }
  gx::team_barrier();
  if (!valid) return;
  for (int e = lane; e < E; e += gx::kTeam) p.d_logits[t * E + e] = row[e];
}

template <int L, int Q>
void route(const RouteTopkParams& p, bool aligned) {
  const int64_t blocks = (p.T + kThreads / L - 1) / (kThreads / L);
  if (blocks > 1) gx::launch("route_topk", zero_counts, dim3(1), kThreads, 0, p.device, p.expert_counts, static_cast<int>(p.E));
  gx::launch_early("route_topk", route_kernel<L, Q>, dim3(static_cast<unsigned>(blocks)), kThreads, 0, p.device, p, aligned);
}

}  // namespace

void route_topk(const RouteTopkParams& p) {
  if (p.T == 0) return gx::fill_zero("route_topk", p.expert_counts, static_cast<size_t>(p.E) * sizeof(int32_t), p.device);
  const auto at16 = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  const bool aligned = p.E % 4 == 0 && at16(p.logits) && at16(p.bias) && at16(p.scores);
  if (p.T >= kManyTokens && aligned && p.n_group == 1 && p.K <= 8) {
    if (p.E == 128) return route<8, 4>(p, aligned);
    if (p.E == 160) return route<8, 5>(p, aligned);
    if (p.E == 256) return route<8, 8>(p, aligned);
  }
  if (p.E <= 128) return route<32, 1>(p, aligned);
  if (p.E <= 256) return route<32, 2>(p, aligned);
  return route<32, 4>(p, aligned);
}

void route_topk_backward(const RouteTopkBackwardParams& p) {
  gx::launch("route_topk_backward", route_backward_kernel, dim3(static_cast<unsigned>((p.T + kTeams - 1) / kTeams)), kThreads, 0, p.device,
             p);
}

}  // namespace glmx::gpu
