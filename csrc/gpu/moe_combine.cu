// moe_combine / gpu: out[t] = sum over k of topk_weights[t,k] * rows[inverse[t,k]]; backward to rows and weights
// Contract   include/glmx/ops.h MoeCombineParams   Oracle reference/moe_combine.py   Doc docs/ops/moe_combine.md
// Shapes     rows, d_rows [R,H] dtype | topk_weights, d_topk_weights [T,K] f32 | inverse [T,K] i32 | out, d_out [T,H] dtype
// Layout     row-major, any H. Where rows are whole multiples of 16 bytes and aligned, a thread moves 16 bytes at a time, else one element
// Numerics   forward: fma from +0 in the order of k, one rounding, column by column, so neither T nor the sort of the rows can show;
//            d_rows: one product, one rounding; d_topk_weights: element i in lane i % 16, folded 16 -> 8 -> 4 -> 2 -> 1, whatever the width
// Algorithm  forward: a thread owns 16 bytes of columns of a token and has up to eight rows' loads on their way at once.
//            Backward: the pairs name their rows first (pair_of_row, whose zeros are "none"; a row named twice is an error). Then two
//            (bf16) or four (fp32) threads own a pair and hold the sixteen lanes of its dot between them, 16 bytes a step each: the pairs
//            of a token are neighbours, so d_out is fetched once for all of them. Each team also writes the zeros of unnamed rows
// Work/bytes 2*T*K*H flop; T*K*H + T*H elements forward, 2*T*K*H + T*H backward: bound by memory
// Measured   H200, bf16, K = 8: 3.5 to 3.9 TB/s from 1024 tokens on, 82 to 92 % of a copy; backward 1.36 to 1.40 TB/s, a third of one
// Limits     a row outside [-1, R), or one named twice in the backward, ends the stream with an error

#include <type_traits>

#include "gpu/bits.h"
#include "gpu/gx/gx.h"
#include "gpu/kernels.h"

namespace glmx::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsAhead = 8;  // of top_k rows: 128 bytes on their way per thread

// N neighbouring elements of a row, 16 bytes or one: as they are stored, and as numbers.
template <class T, int N>
using Stored = std::conditional_t<N == 1, T, gx::Vec16>;
template <int N>
struct Columns {
  float v[N];
};

template <class T, int N>
__device__ inline Stored<T, N> fetch(const T* p) {
  if constexpr (N == 1) {
    return *p;
  } else {
    return gx::load16(p);
  }
}
// Of what nobody else reads.
template <class T, int N>
__device__ inline Stored<T, N> fetch_once(const T* p) {
  if constexpr (N == 1) {
    return *p;
  } else {
    return gx::load16_once(p);
  }
}
template <class T, int N>
__device__ inline Columns<N> columns(const Stored<T, N>& bits) {
  Columns<N> c;
  if constexpr (N == 1) {
    c.v[0] = gx::load(&bits);
  } else {
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 2) {
        c.v[2 * i] = gx::low(bits.word[i]);
        c.v[2 * i + 1] = gx::high(bits.word[i]);
      } else {
        c.v[i] = gx::from_bits(bits.word[i]);
      }
    }
  }
  return c;
}
template <class T, int N>
__device__ inline void store_columns(T* p, const Columns<N>& c) {
  if constexpr (N == 1) {
    gx::store(p, c.v[0]);
  } else {
    gx::Vec16 bits;
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 2) {
        bits.word[i] = gx::pack(c.v[2 * i], c.v[2 * i + 1]);
      } else {
        bits.word[i] = gx::to_bits(c.v[i]);
      }
    }
    gx::store16(p, bits);
  }
}

// A grid of [tokens, parts of H].
template <class T, int N>
__global__ void __launch_bounds__(kThreads) combine_kernel(const MoeCombineParams p) {
  const int64_t t = blockIdx.x, column = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * N;
  if (column >= p.H) return;
  const T* rows = static_cast<const T*>(p.rows) + column;
  const int32_t* inverse = p.inverse + t * p.K;
  const float* weights = p.topk_weights == nullptr ? nullptr : p.topk_weights + t * p.K;
  Columns<N> sum{};
  for (int64_t begin = 0; begin < p.K; begin += kRowsAhead) {
    const int n = static_cast<int>(p.K - begin < kRowsAhead ? p.K - begin : kRowsAhead);
    int32_t r[kRowsAhead];
    bool good = true;
#pragma unroll
    for (int k = 0; k < kRowsAhead; ++k) {
      r[k] = k < n ? inverse[begin + k] : -1;
      good = good && r[k] >= -1 && r[k] < p.R;
    }
    gx::require(good);
    Stored<T, N> row[kRowsAhead];
#pragma unroll
    for (int k = 0; k < kRowsAhead; ++k) row[k] = r[k] >= 0 ? fetch_once<T, N>(rows + r[k] * p.H) : Stored<T, N>{};
#pragma unroll
    for (int k = 0; k < kRowsAhead; ++k) {
      if (r[k] < 0) continue;
      const float w = weights == nullptr ? 1.0f : weights[begin + k];
      const Columns<N> x = columns<T, N>(row[k]);
      for (int i = 0; i < N; ++i) sum.v[i] = gx::fma(w, x.v[i], sum.v[i]);
    }
  }
  store_columns<T, N>(static_cast<T*>(p.out) + t * p.H + column, sum);
}

// pair_of_row[r] = 1 + the pair that names row r; it begins as zeros.
__global__ void __launch_bounds__(kThreads) name_rows_kernel(const MoeCombineBackwardParams p) {
  const int64_t pair = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (pair >= p.T * p.K) return;
  const int32_t row = p.inverse[pair];
  gx::require(row >= -1 && row < p.R);
  if (row >= 0) gx::require(gx::atomic_add(p.pair_of_row + row, static_cast<int32_t>(pair) + 1) == 0);
  if (row < 0 && p.d_topk_weights != nullptr) p.d_topk_weights[pair] = 0.0f;
}

// N columns a step; the 16 / N threads of a pair hold the sixteen lanes of its dot.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) backward_kernel(const MoeCombineBackwardParams p) {
  constexpr int kWidth = gx::kRowLanes / N;       // threads of a pair
  constexpr int kTeamItems = gx::kTeam / kWidth;  // pairs of a team
  constexpr int kUnroll = N == 1 ? 8 : 4;         // steps whose loads are on their way at once
  const int64_t team = int64_t{blockIdx.x} * (kThreads / gx::kTeam) + gx::team();
  const int64_t pair = team * kTeamItems + gx::lane() / kWidth;
  const int part = gx::lane() % kWidth;
  const int32_t r = pair < p.T * p.K ? p.inverse[pair] : -1;
  const bool dots = p.d_topk_weights != nullptr;
  float lanes[N] = {};
  if (r >= 0) {
    const T* row = static_cast<const T*>(p.rows) + r * p.H;
    const T* d_out = static_cast<const T*>(p.d_out) + pair / p.K * p.H;
    T* d_row = static_cast<T*>(p.d_rows) + r * p.H;
    const float w = p.topk_weights == nullptr ? 1.0f : p.topk_weights[pair];
#pragma unroll 1
    for (int64_t begin = part * N; begin < p.H; begin += kUnroll * gx::kRowLanes) {
      Stored<T, N> d_bits[kUnroll], x_bits[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t i = begin + u * gx::kRowLanes;
        d_bits[u] = i < p.H ? fetch<T, N>(d_out + i) : Stored<T, N>{};
        x_bits[u] = dots && i < p.H ? fetch_once<T, N>(row + i) : Stored<T, N>{};
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t i = begin + u * gx::kRowLanes;
        if (i >= p.H) continue;
        const Columns<N> d = columns<T, N>(d_bits[u]), x = columns<T, N>(x_bits[u]);
        Columns<N> out;
        for (int j = 0; j < N; ++j) {
          lanes[j] = gx::fma(d.v[j], x.v[j], lanes[j]);
          out.v[j] = w * d.v[j];
        }
        store_columns<T, N>(d_row + i, out);
      }
    }
  }
  // Lane j of the dot is lanes[j % N] of thread j / N: threads fold first, then the lanes in each.
  for (int mask = kWidth / 2; mask > 0; mask /= 2) {
    for (int j = 0; j < N; ++j) lanes[j] = lanes[j] + gx::shuffle_xor(lanes[j], mask);
  }
  for (int half = N / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) lanes[j] = lanes[j] + lanes[j + half];
  }
  if (r >= 0 && dots && part == 0) p.d_topk_weights[pair] = lanes[0];

  // Rows that no pair names: a part of them for each team.
  const int64_t candidate = team * kTeamItems + gx::lane();
  const bool unnamed = gx::lane() < kTeamItems && candidate < p.R && p.pair_of_row[candidate] == 0;
  for (uint32_t left = gx::ballot(unnamed); left != 0; left &= left - 1) {
    T* d_row = static_cast<T*>(p.d_rows) + (team * kTeamItems + lowest_bit(left)) * p.H;
    for (int64_t i = gx::lane() * N; i < p.H; i += gx::kTeam * N) store_columns<T, N>(d_row + i, Columns<N>{});
  }
}

template <class... Pointers>
bool vectors(int64_t H, DType dtype, Pointers... pointers) {
  return H * dtype_size(dtype) % 16 == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

template <class T, int N>
void combine(const MoeCombineParams& p) {
  const int64_t parts = (p.H + int64_t{N} * kThreads - 1) / (int64_t{N} * kThreads);
  gx::launch("moe_combine", combine_kernel<T, N>, dim3(static_cast<unsigned>(p.T), static_cast<unsigned>(parts)), kThreads, 0, p.device, p);
}

template <class T, int N>
void combine_backward(const MoeCombineBackwardParams& p) {
  const int64_t items = p.T * p.K > p.R ? p.T * p.K : p.R, block_items = kThreads * N / gx::kRowLanes;
  const dim3 grid(static_cast<unsigned>((items + block_items - 1) / block_items));
  gx::launch("moe_combine_backward", backward_kernel<T, N>, grid, kThreads, 0, p.device, p);
}

}  // namespace

void moe_combine(const MoeCombineParams& p) {
  const bool wide = vectors(p.H, p.dtype, p.rows, p.out);
  if (p.dtype == DType::bf16) return wide ? combine<uint16_t, 8>(p) : combine<uint16_t, 1>(p);
  return wide ? combine<float, 4>(p) : combine<float, 1>(p);
}

void moe_combine_backward(const MoeCombineBackwardParams& p) {
  gx::fill_zero("moe_combine_backward", p.pair_of_row, static_cast<size_t>(p.R) * sizeof(int32_t), p.device);
  const dim3 grid(static_cast<unsigned>((p.T * p.K + kThreads - 1) / kThreads));
  gx::launch("moe_combine_backward (names)", name_rows_kernel, grid, kThreads, 0, p.device, p);
  const bool wide = vectors(p.H, p.dtype, p.d_out, p.rows, p.d_rows);
  if (p.dtype == DType::bf16) return wide ? combine_backward<uint16_t, 8>(p) : combine_backward<uint16_t, 1>(p);
  return wide ? combine_backward<float, 4>(p) : combine_backward<float, 1>(p);
}

}  // namespace glmx::gpu
