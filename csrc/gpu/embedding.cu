// embedding / gpu: y[t] = weight[ids[t]]; backward d_weight[v] = sum of dy[t] over the tokens with id v
// Contract   include/glmx/ops.h EmbeddingParams   Oracle cpu/inl/embedding.inl, bit for bit   Doc docs/ops/embedding.md
// Shapes     ids [T] i64 | weight [V,H], y, dy [T,H] dtype | d_weight [V,H] f32 | offsets [V+1], order [T] i32
// Layout     rows are copied in units of 16, 4 or 2 bytes, the largest that they are made of; sums are taken four columns at a time
// Numerics   forward: a copy. Backward: fp32 additions from +0 in the order of tokens, then one addition if accumulating
// Algorithm  forward: one thread = one unit. Backward, all on the device and without atomics on floats:
//            count tokens of each id; scan the counts (one block, two passes); scatter the tokens by atomic cursors, in any order: the
//            cursor of id v ends where id v + 1 begins; sort inside each id, which makes the order the tokens' own again: up to 32
//            tokens by rank in a team, more by a block that looks for the id through all tokens in order. Then a thread adds the tokens of
//            its id and columns; ids without tokens write zeros
// Work/bytes T*H additions; T*H elements read, V*H f32 written: bound by memory. An id with more than 32 tokens reads all ids twice: with T
//            tokens there are at most T/32 such ids, each of a block of its own
// Measured   ran on an H200 (docs/gpu.md), not timed there
// Limits     an id outside [0, V) ends the stream with an error; T < 2^31 - 1 is checked in ops/embedding.cpp
#include "gpu/gx/gx.h"
#include "gpu/kernels.h"
#include "gpu/rows.h"

namespace glmx::gpu {
namespace {

template <class Unit>
__global__ void __launch_bounds__(kCutThreads) copy_units(EmbeddingParams p, Cut cut) {
  Place at;
  if (!find_place(cut, p.T, at)) return;
  const int64_t id = p.ids[at.row];
  gx::require(id >= 0 && id < p.V);
  static_cast<Unit*>(p.y)[at.row * cut.pieces + at.piece] = static_cast<const Unit*>(p.weight)[id * cut.pieces + at.piece];
}

template <class Unit>
void copy_rows(const EmbeddingParams& p, int64_t row_bytes) {
  const Cut cut = cut_rows("embedding", p.T, row_bytes / int64_t{sizeof(Unit)});
  gx::launch("embedding", copy_units<Unit>, cut.grid, cut.threads, 0, p.device, p, cut);
}

constexpr int kThreads = 256, kTeams = kThreads / gx::kTeam;
constexpr int kScanThreads = 1024, kScanTeams = kScanThreads / gx::kTeam;
constexpr int kAhead = 4;  // loads that a team has in flight in the scans

__global__ void __launch_bounds__(kThreads) count_tokens(EmbeddingBackwardParams p) {
  const int64_t t = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (t >= p.T) return;
  const int64_t id = p.ids[t];
  gx::require(id >= 0 && id < p.V);
  gx::atomic_add(p.offsets + id, 1);
}

__device__ inline int32_t sum_of_team(int32_t v) {
  for (int mask = gx::kTeam / 2; mask > 0; mask /= 2) v += gx::shuffle_xor(v, mask);
  return v;
}

// Counts become the sums of those before them. Each team owns a stretch of the vocabulary.
__global__ void __launch_bounds__(kScanThreads) scan_counts(EmbeddingBackwardParams p) {
  __shared__ int32_t total[kScanTeams];
  constexpr int kStep = gx::kTeam * kAhead;
  const int lane = gx::lane(), team = gx::team();
  const int64_t stretch = gx::ceil_div(gx::ceil_div(p.V, kScanTeams), kStep) * kStep;
  const int64_t begin = team * stretch, end = begin + stretch < p.V ? begin + stretch : p.V;
  int32_t sum = 0;
  for (int64_t i = begin; i < end; i += kStep) {
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int64_t v = i + j * gx::kTeam + lane;
      sum += v < end ? p.offsets[v] : 0;
    }
  }
  sum = sum_of_team(sum);
  if (lane == 0) total[team] = sum;
  gx::barrier();
  int32_t before = 0;
  for (int i = 0; i < team; ++i) before += total[i];
  for (int64_t i = begin; i < end; i += kStep) {
    int32_t count[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int64_t v = i + j * gx::kTeam + lane;
      count[j] = v < end ? p.offsets[v] : 0;
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      int32_t through = count[j];  // the sum of lanes up to this one
      for (int step = 1; step < gx::kTeam; step *= 2) {
        const int32_t other = gx::shuffle(through, lane < step ? lane : lane - step);
        if (lane >= step) through += other;
      }
      const int64_t v = i + j * gx::kTeam + lane;
      if (v < end) p.offsets[v] = before + through - count[j];
      before += gx::shuffle(through, gx::kTeam - 1);
    }
  }
}

__global__ void __launch_bounds__(kThreads) scatter_tokens(EmbeddingBackwardParams p) {
  const int64_t t = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (t >= p.T) return;
  p.order[gx::atomic_add(p.offsets + p.ids[t], 1)] = static_cast<int32_t>(t);
}

// After the scatter: the tokens of id v are order[begin .. end).
struct Tokens {
  int32_t begin, end;
};
__device__ inline Tokens tokens_of(const EmbeddingBackwardParams& p, int64_t v) {
  if (v >= p.V) return {0, 0};
  return {v == 0 ? 0 : p.offsets[v - 1], p.offsets[v]};
}

__device__ inline int bits_set(uint32_t mask) {
  mask = mask - ((mask >> 1) & 0x55555555u);
  mask = (mask & 0x33333333u) + ((mask >> 2) & 0x33333333u);
  return static_cast<int>((((mask + (mask >> 4)) & 0x0f0f0f0fu) * 0x01010101u) >> 24);
}

// Tokens that are in `order` already, sorted by a team: a token's place is how many are smaller.
__device__ inline void sort_few(const EmbeddingBackwardParams& p, Tokens own) {
  const int n = own.end - own.begin, lane = gx::lane();
  const int32_t token = lane < n ? p.order[own.begin + lane] : INT32_MAX;
  int rank = 0;
  for (int i = 0; i < n; ++i) rank += gx::shuffle(token, i) < token ? 1 : 0;
  gx::team_barrier();
  if (lane < n) p.order[own.begin + rank] = token;
}

// The tokens of id v, found again in order by a block: each team counts those of its stretch of tokens, then writes them.
__device__ inline void find_many(const EmbeddingBackwardParams& p, int64_t v, Tokens own, int32_t* counted) {
  constexpr uint32_t kStep = gx::kTeam * kAhead;
  const uint32_t lane = static_cast<uint32_t>(gx::lane()), team = static_cast<uint32_t>(gx::team()), T = static_cast<uint32_t>(p.T);
  const uint32_t stretch = (T / kTeams / kStep + 1) * kStep;
  const uint32_t begin = team * stretch, end = begin + stretch < T ? begin + stretch : T;
  int32_t count = 0;
  for (uint32_t i = begin; i < end; i += kStep) {
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const uint32_t t = i + j * gx::kTeam + lane;
      count += t < end && p.ids[t] == v ? 1 : 0;
    }
  }
  count = sum_of_team(count);
  gx::barrier();  // the id before this one has read its counts
  if (lane == 0) counted[team] = count;
  gx::barrier();
  int32_t next = own.begin;
  for (uint32_t i = 0; i < team; ++i) next += counted[i];
  for (uint32_t i = begin; i < end; i += kStep) {
    bool mine[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const uint32_t t = i + j * gx::kTeam + lane;
      mine[j] = t < end && p.ids[t] == v;
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const uint32_t mask = gx::ballot(mine[j]);
      if (mine[j]) p.order[next + bits_set(mask & ((1u << lane) - 1u))] = static_cast<int32_t>(i + j * gx::kTeam + lane);
      next += bits_set(mask);
    }
  }
}

// Every team sorts an id; ids of many tokens are then left to the whole block, one after the other.
__global__ void __launch_bounds__(kThreads) sort_tokens(EmbeddingBackwardParams p) {
  __shared__ int32_t counted[kTeams];
  const int64_t first = int64_t{blockIdx.x} * kTeams;
  const Tokens own = tokens_of(p, first + gx::team());
  if (own.end - own.begin > 1 && own.end - own.begin <= gx::kTeam) sort_few(p, own);
#pragma unroll 1
  for (int i = 0; i < kTeams; ++i) {
    const Tokens many = tokens_of(p, first + i);
    if (many.end - many.begin > gx::kTeam) find_many(p, first + i, many, counted);
  }
}

constexpr int kColumns = 4;
struct alignas(8) Bf16x4 {
  uint32_t word[2];
};
__device__ inline void load_columns(const float* p, float (&v)[kColumns]) {
  const Piece<float> a = unpack(gx::load16(p), p);
  for (int j = 0; j < kColumns; ++j) v[j] = a.v[j];
}
__device__ inline void load_columns(const uint16_t* p, float (&v)[kColumns]) {
  const Bf16x4 raw = *reinterpret_cast<const Bf16x4*>(p);
  v[0] = gx::low(raw.word[0]), v[1] = gx::high(raw.word[0]);
  v[2] = gx::low(raw.word[1]), v[3] = gx::high(raw.word[1]);
}

template <class T>
__global__ void __launch_bounds__(kCutThreads) sum_tokens(EmbeddingBackwardParams p, Cut cut, bool wide) {
  Place at;
  if (!find_place(cut, p.V, at)) return;
  const Tokens own = tokens_of(p, at.row);
  if (p.accumulate && own.begin == own.end) return;
  const int64_t i = int64_t{at.piece} * kColumns;
  float* out = p.d_weight + at.row * p.H + i;
  const T* dy = static_cast<const T*>(p.dy) + i;
  float sum[kColumns] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (wide) {
#pragma unroll 4
    for (int32_t k = own.begin; k < own.end; ++k) {
      float grad[kColumns];
      load_columns(dy + p.order[k] * p.H, grad);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[j] = sum[j] + grad[j];
    }
    if (p.accumulate) {
      float old[kColumns];
      load_columns(out, old);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum[j] = old[j] + sum[j];
    }
    gx::store16(out, {{gx::to_bits(sum[0]), gx::to_bits(sum[1]), gx::to_bits(sum[2]), gx::to_bits(sum[3])}});
    return;
  }
  for (int j = 0; j < kColumns && i + j < p.H; ++j) {
    float column = 0.0f;
#pragma unroll 4
    for (int32_t k = own.begin; k < own.end; ++k) column = column + gx::load(dy + p.order[k] * p.H + j);
    out[j] = p.accumulate ? out[j] + column : column;
  }
}

template <class T>
void backward(const EmbeddingBackwardParams& p) {
  constexpr const char* kName = "embedding_backward";
  const dim3 tokens(static_cast<unsigned>(pieces_of(p.T, kThreads)));
  gx::fill_zero(kName, p.offsets, static_cast<size_t>(p.V) * sizeof(int32_t), p.device);
  gx::launch(kName, count_tokens, tokens, kThreads, 0, p.device, p);
  gx::launch(kName, scan_counts, dim3(1), kScanThreads, 0, p.device, p);
  gx::launch(kName, scatter_tokens, tokens, kThreads, 0, p.device, p);
  if (p.T > 0) gx::launch(kName, sort_tokens, dim3(static_cast<unsigned>(pieces_of(p.V, kTeams))), kThreads, 0, p.device, p);
  const Cut cut = cut_rows(kName, p.V, pieces_of(p.H, kColumns));
  const bool wide = wide_rows(p.H * int64_t{sizeof(float)}, p.d_weight) && reinterpret_cast<uintptr_t>(p.dy) % (kColumns * sizeof(T)) == 0;
  gx::launch(kName, sum_tokens<T>, cut.grid, cut.threads, 0, p.device, p, cut, wide);
}

}  // namespace

void embedding(const EmbeddingParams& p) {
  const int64_t row_bytes = p.H * dtype_size(p.dtype);
  const auto aligned = [&](uintptr_t to) {
    return row_bytes % static_cast<int64_t>(to) == 0 &&
           (reinterpret_cast<uintptr_t>(p.weight) | reinterpret_cast<uintptr_t>(p.y)) % to == 0;
  };
  if (aligned(16)) {
    copy_rows<gx::Vec16>(p, row_bytes);
  } else if (aligned(4)) {
    copy_rows<uint32_t>(p, row_bytes);
  } else {
    copy_rows<uint16_t>(p, row_bytes);
  }
}

void embedding_backward(const EmbeddingBackwardParams& p) { p.dtype == DType::bf16 ? backward<uint16_t>(p) : backward<float>(p); }

}  // namespace glmx::gpu
