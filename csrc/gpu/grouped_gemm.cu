// grouped_gemm / gpu: out[r,:] = x[token(r),:] @ w[e(r)]^T and its gradients on any card with mma.sync, bf16
// Contract   include/glmx/ops.h GroupedGemmParams   Oracle reference/grouped_gemm.py   Doc docs/ops/grouped_gemm.md
// Shapes     x [M,K] | w [E,N,K] | dy [R,N] bf16 | expert_offsets [E+1] i32 | out, dx bf16 or f32 | dw [E,N,K] bf16 or f32
// Layout     operands as they lie in memory. A stage holds 128 x 32 of each: rows of 32 k (forward), or 32 rows of 128 where the reduction
//            runs down the rows (w in dgrad, dy and x in wgrad; ldmatrix transposes). Chunks of 16 bytes are swizzled so that ldmatrix
//            meets no bank twice. Row lengths that are no multiple of 8, or addresses of 16, are loaded element by element
// Numerics   mma.sync m16n8k16, k in order from the start of the reduction, padded with zeros to 32; fp32 sums; one rounding (two with
//            preact). The order depends on K alone, so X1 X2 X3 hold
// Algorithm  a block of 8 teams (2 x 4, each 64 x 32) owns a tile of 128 x 128; four stages of cp.async; sums pass through shared memory
//            so that stores, bias and silu_mul work on whole rows. silu_mul: a tile is 64 gate columns and the 64 up columns beside them
// Work/bytes 2*M*N*K flop; M*K + E*N*K + M*N elements: bound by the matrix unit above about 200 rows an expert
// Measured   H200: 205 to 275 TFLOP/s, forward and gradients, from 1024 rows an expert on
// Limits     stored weights are refused in ops/grouped_gemm.cpp; fp32 operands: grouped_gemm_f32.cu; Hopper's forward: sm90/grouped_gemm.cu
#include "gpu/gemm_paths.h"
#include "gpu/gemm_tiles.h"
#include "gpu/kernels.h"

namespace glmx::gpu {
namespace {

constexpr int kTile = 128, kDepth = 32, kThreads = 256, kStages = 4;
constexpr int kTeamRows = 64, kTeamColumns = 32;   // of a tile: 2 x 4 teams
constexpr int kOperandBytes = kTile * kDepth * 2;  // one operand of one stage
constexpr int kPitch = kTile + 4;                  // of the sums in shared memory, in floats: rows begin four banks apart
constexpr int kSharedBytes = kTile * kPitch * 4;   // what the epilogue needs, more than the stages do
static_assert(kStages * 2 * kOperandBytes <= kSharedBytes);

// A 128 x 32 operand tile in two halves of lines. Element (line, i) lies at base + row(line) * stride + i.
struct Half {
  const uint16_t* base;
  const int32_t* gather;  // row(line) = gather[line], or line without one
  int lines;              // those that exist; the others read as zeros
};
struct Operand {
  Half half[2];
  int64_t stride;
  int width;     // elements of a line that exist
  bool vectors;  // lines begin at multiples of 16 bytes and have a multiple of 8 elements
};

// Lines and the two halves of a matrix [lines, width] from `line` on, `tile_lines` of them.
__device__ Half half_of(const uint16_t* base, const int32_t* gather, int64_t stride, int64_t line, int64_t lines) {
  const int left = static_cast<int>(lines - line);
  if (gather != nullptr) return {base, gather + line, left};
  return {base + line * stride, nullptr, left};
}

// Where the chunk of 8 elements lies, in elements. Lines of 32: two of them share 128 bytes of banks; lines of 128 take two times 128.
template <bool kDown>
__device__ int place(int line, int chunk) {
  return kDown ? line * kTile + (chunk ^ (line & 7)) * 8 : line * kDepth + (chunk ^ (line / 2 & 3)) * 8;
}

// kDown: the reduction runs down the lines: 32 lines of 128 elements. Else 128 lines of 32.
template <bool kDown>
__device__ void load_operand(uint16_t* shared, const Operand& o, int first_line, int first_element) {
  constexpr int kLines = kDown ? kDepth : kTile, kChunks = (kDown ? kTile : kDepth) / 8;
  static_assert(kLines * kChunks == 2 * kThreads);  // so a pass is a half
#pragma unroll
  for (int pass = 0; pass < 2; ++pass) {
    const int i = pass * kThreads + static_cast<int>(threadIdx.x), line = i / kChunks, chunk = i % kChunks;
    const Half& half = o.half[kDown ? 0 : pass];
    const int at_line = first_line + (kDown ? line : line % (kLines / 2)), at = first_element + chunk * 8;
    const bool exists = at_line < half.lines;
    const int64_t row = !exists ? 0 : half.gather != nullptr ? half.gather[at_line] : at_line;
    const uint16_t* from = half.base + row * o.stride + at;
    uint16_t* to = shared + place<kDown>(line, chunk);
    if (o.vectors) {
      const bool valid = exists && at < o.width;
      gx::copy_async16(to, valid ? from : half.base, valid);
    } else {
      uint16_t element[8];
      for (int j = 0; j < 8; ++j) element[j] = exists && at + j < o.width ? from[j] : uint16_t{0};
      gx::Vec16 all;
      for (int j = 0; j < 4; ++j) all.word[j] = element[2 * j] | (uint32_t{element[2 * j + 1]} << 16);
      gx::store16(to, all);
    }
  }
}

// sums[m][n] = sum over k of A(m, k) B(n, k) of one tile, into shared memory; `depth` k in all. Every thread of the block calls it.
template <bool kDownA, bool kDownB>
__device__ void multiply_tile(unsigned char* shared, const Operand& a, const Operand& b, int depth) {
  uint16_t* const stages = reinterpret_cast<uint16_t*>(shared);
  const auto stage_a = [&](int step) { return stages + step % kStages * (kOperandBytes); };  // two operands of kOperandBytes / 2 elements
  const auto stage_b = [&](int step) { return stages + step % kStages * (kOperandBytes) + kOperandBytes / 2; };
  const int steps = (depth + kDepth - 1) / kDepth;
  const auto load = [&](int step) {
    if (step < steps) {
      load_operand<kDownA>(stage_a(step), a, kDownA ? step * kDepth : 0, kDownA ? 0 : step * kDepth);
      load_operand<kDownB>(stage_b(step), b, kDownB ? step * kDepth : 0, kDownB ? 0 : step * kDepth);
    }
    gx::commit();
  };
  const int team_row = gx::team() / 4 * kTeamRows, team_column = gx::team() % 4 * kTeamColumns;
  gx::FragC sums[kTeamRows / 16][kTeamColumns / 8] = {};
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    gx::wait<kStages - 2>();
    gx::barrier();  // the step's data is there for all, and the stage that is loaded next has been read by all
    load(step + kStages - 1);
    for (int k = 0; k < kDepth; k += 16) {
      gx::FragA fa[kTeamRows / 16];
      for (int i = 0; i < kTeamRows / 16; ++i) {
        if (kDownA) {
          const int line = k + gx::load_a_transposed_k(), element = team_row + 16 * i + gx::load_a_transposed_m();
          gx::load_a_transposed(fa[i], stage_a(step) + place<true>(line, element / 8));
        } else {
          gx::load_a(fa[i], stage_a(step) + place<false>(team_row + 16 * i + gx::load_a_m(), (k + gx::load_a_k()) / 8));
        }
      }
      for (int j = 0; j < kTeamColumns / 16; ++j) {
        gx::FragB fb[2];
        if (kDownB) {
          const int line = k + gx::load_b_transposed_k(), element = team_column + 16 * j + gx::load_b_transposed_n();
          gx::load_b_pair_transposed(fb, stage_b(step) + place<true>(line, element / 8));
        } else {
          gx::load_b_pair(fb, stage_b(step) + place<false>(team_column + 16 * j + gx::load_b_n(), (k + gx::load_b_k()) / 8));
        }
        for (int i = 0; i < kTeamRows / 16; ++i) {
          gx::mma(sums[i][2 * j], fa[i], fb[0]);
          gx::mma(sums[i][2 * j + 1], fa[i], fb[1]);
        }
      }
    }
  }
  gx::wait<0>();
  gx::barrier();  // the stages are free: the sums take their place
  float* const tile = reinterpret_cast<float*>(shared);
  for (int i = 0; i < kTeamRows / 16; ++i) {
    for (int j = 0; j < kTeamColumns / 8; ++j) {
      const gx::FragC& c = sums[i][j];
      for (int v = 0; v < 4; ++v) tile[(team_row + 16 * i + c.row(v)) * kPitch + team_column + 8 * j + c.col(v)] = c.v[v];
    }
  }
  gx::barrier();
}

__global__ void __launch_bounds__(kThreads, 2) forward_mma(const GroupedGemmParams p, bool vectors) {
  GX_DYNAMIC_SHARED(unsigned char, shared);
  int32_t* const first = reinterpret_cast<int32_t*>(shared + kSharedBytes);
  count_row_tiles(first, p.expert_offsets, p.E, p.R, kTile);
  gx::barrier();
  // With silu_mul a tile's lines of w are 64 gate rows and their 64 up rows.
  const int64_t columns = p.silu_mul ? p.N / 2 : p.N;
  const int width = p.silu_mul ? kTile / 2 : kTile;
  const RowTiles tiles{first, p.expert_offsets, p.R, static_cast<int>(p.E), kTile, width, static_cast<int>(gx::ceil_div(columns, width))};
  for (int index = static_cast<int>(blockIdx.x); index < tiles.count(); index += static_cast<int>(gridDim.x)) {
    const Tile t = tiles.tile(index);
    const uint16_t* x = static_cast<const uint16_t*>(p.x);
    const uint16_t* w = static_cast<const uint16_t*>(p.w) + int64_t{t.expert} * p.N * p.K;
    const int64_t end = int64_t{t.row} + t.rows, up = p.silu_mul ? p.N / 2 : kTile / 2, limit = p.silu_mul ? p.N : columns;
    const Operand a{{half_of(x, p.row_token, p.K, t.row, end), half_of(x, p.row_token, p.K, t.row + kTile / 2, end)},
                    p.K,
                    static_cast<int>(p.K),
                    vectors};
    const Operand b{
        {half_of(w, nullptr, p.K, t.column, columns), half_of(w, nullptr, p.K, t.column + up, limit)}, p.K, static_cast<int>(p.K), vectors};
    multiply_tile<false, false>(shared, a, b, static_cast<int>(p.K));
    const float* sums = reinterpret_cast<const float*>(shared);
    for (int i = static_cast<int>(threadIdx.x); i < t.rows * width; i += kThreads) {
      const int row = i / width, column = i % width;
      if (t.column + column < columns) {
        const float sum = sums[row * kPitch + column], second = p.silu_mul ? sums[row * kPitch + kTile / 2 + column] : 0.0f;
        store_forward(p, t.expert, t.row + row, t.column + column, sum, second);
      }
    }
    gx::barrier();  // the sums have been read: the next tile's stages may come
  }
  check_rows(p.row_token, p.expert_offsets, p.E, p.R, p.M);
  zero_forward(p, int64_t{blockIdx.x} * kThreads + threadIdx.x, int64_t{gridDim.x} * kThreads);
}

__global__ void __launch_bounds__(kThreads, 2) dgrad_mma(const GroupedGemmDgradParams p, bool vectors) {
  GX_DYNAMIC_SHARED(unsigned char, shared);
  int32_t* const first = reinterpret_cast<int32_t*>(shared + kSharedBytes);
  count_row_tiles(first, p.expert_offsets, p.E, p.R, kTile);
  gx::barrier();
  const RowTiles tiles{first, p.expert_offsets, p.R, static_cast<int>(p.E), kTile, kTile, static_cast<int>(gx::ceil_div(p.K, kTile))};
  for (int index = static_cast<int>(blockIdx.x); index < tiles.count(); index += static_cast<int>(gridDim.x)) {
    const Tile t = tiles.tile(index);
    const uint16_t* dy = static_cast<const uint16_t*>(p.dy);
    const uint16_t* w = static_cast<const uint16_t*>(p.w) + int64_t{t.expert} * p.N * p.K;
    const int64_t end = t.row + t.rows;
    const Operand a{
        {half_of(dy, nullptr, p.N, t.row, end), half_of(dy, nullptr, p.N, t.row + kTile / 2, end)}, p.N, static_cast<int>(p.N), vectors};
    const Operand b{{{w + t.column, nullptr, static_cast<int>(p.N)}, {}}, p.K, static_cast<int>(p.K - t.column), vectors};
    multiply_tile<false, true>(shared, a, b, static_cast<int>(p.N));
    const float* sums = reinterpret_cast<const float*>(shared);
    for (int i = static_cast<int>(threadIdx.x); i < t.rows * kTile; i += kThreads) {
      const int row = i / kTile, column = i % kTile;
      if (t.column + column < p.K)
        store_model(p.dx, p.out_dtype, int64_t{t.row + row} * p.K + t.column + column, sums[row * kPitch + column]);
    }
    gx::barrier();
  }
  zero_rows(p.dx, p.out_dtype, p.K, first_row(p.expert_offsets, p.E, p.R), p.R, int64_t{blockIdx.x} * kThreads + threadIdx.x,
            int64_t{gridDim.x} * kThreads);
}

__global__ void __launch_bounds__(kThreads, 2) wgrad_mma(const GroupedGemmWgradParams p, bool vectors) {
  GX_DYNAMIC_SHARED(unsigned char, shared);
  const int64_t down = gx::ceil_div(p.N, kTile), across = gx::ceil_div(p.K, kTile);
  for (int64_t index = blockIdx.x; index < p.E * down * across; index += gridDim.x) {
    const int64_t e = index / (down * across), n = index / across % down * kTile, k = index % across * kTile;
    const int64_t begin = first_row(p.expert_offsets, e, p.R), rows = first_row(p.expert_offsets, e + 1, p.R) - begin;
    if (rows == 0 && p.accumulate) continue;
    const uint16_t* dy = static_cast<const uint16_t*>(p.dy) + begin * p.N + n;
    const uint16_t* x = static_cast<const uint16_t*>(p.x) + k;
    const Operand a{{{dy, nullptr, static_cast<int>(rows)}, {}}, p.N, static_cast<int>(p.N - n), vectors};
    const Operand b{{half_of(x, p.row_token, p.K, begin, begin + rows), {}}, p.K, static_cast<int>(p.K - k), vectors};
    multiply_tile<true, true>(shared, a, b, static_cast<int>(rows));
    const float* sums = reinterpret_cast<const float*>(shared);
    for (int i = static_cast<int>(threadIdx.x); i < kTile * kTile; i += kThreads) {
      const int row = i / kTile, column = i % kTile;
      if (n + row >= p.N || k + column >= p.K) continue;
      const int64_t at = (e * p.N + n + row) * p.K + k + column;
      const float sum = sums[row * kPitch + column];
      store_model(p.dw, p.out_dtype, at, p.accumulate ? static_cast<const float*>(p.dw)[at] + sum : sum);
    }
    gx::barrier();
  }
  check_rows(p.row_token, p.expert_offsets, p.E, p.R, p.M);
}

// d_bias[e, n]: a thread a column; blocks of 64 rows from the expert's first row, rows and blocks in order.
template <class T>
__global__ void __launch_bounds__(kThreads) bias_gradient(const GroupedGemmBiasGradParams p) {
  const int64_t e = blockIdx.y, n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= p.N) return;
  const int64_t begin = first_row(p.expert_offsets, e, p.R), end = first_row(p.expert_offsets, e + 1, p.R);
  const T* dy = static_cast<const T*>(p.dy) + n;
  float sum = 0.0f;
  for (int64_t block = begin; block < end; block += 64) {
    float part = 0.0f;
    for (int64_t r = block; r < end && r < block + 64; ++r) part = part + gx::load(dy + r * p.N);
    sum = sum + part;
  }
  float* out = p.d_bias + e * p.N + n;
  *out = p.accumulate ? *out + sum : sum;
}

bool vectors_of(int64_t width, const void* matrix) { return width % 8 == 0 && aligned16(matrix); }
size_t shared_bytes(int64_t E) { return kSharedBytes + static_cast<size_t>(E + 1) * sizeof(int32_t); }

// Two blocks a multiprocessor, each taking every n-th tile; no more than there can be tiles, and one at least, for the rows past the last.
dim3 grid_of(int64_t tiles, const Device& device) {
  const int64_t most = 2 * gx::properties(device.index).multiprocessors;
  return dim3(static_cast<unsigned>(tiles < 1 ? 1 : tiles < most ? tiles : most));
}

void forward(const GroupedGemmParams& p) {
  const int64_t columns = p.silu_mul ? gx::ceil_div(p.N / 2, kTile / 2) : gx::ceil_div(p.N, kTile);
  const bool vectors = vectors_of(p.K, p.x) && vectors_of(p.K, p.w);
  gx::launch("grouped_gemm", forward_mma, grid_of(most_tiles("grouped_gemm", p.R, p.E, kTile, columns), p.device), kThreads,
             shared_bytes(p.E), p.device, p, vectors);
}

}  // namespace

// Which forward: a choice by the card and by the shape of the weights, never by the rows, so that a row's bits depend on itself alone.
void grouped_gemm(const GroupedGemmParams& p) {
  if (p.R == 0) return;
  if (p.dtype == DType::f32) return forward_f32(p);
#if GX_HOPPER_PATHS
  if (sm90_takes(p)) return sm90_forward(p);
#endif
  forward(p);
}

const char* grouped_gemm_path(int index, DType dtype) {
  return GX_HOPPER_PATHS && dtype == DType::bf16 && gx::properties(index).architecture == 90 ? "sm90" : "gpu";
}

void grouped_gemm_dgrad(const GroupedGemmDgradParams& p) {
  if (p.R == 0) return;
  if (p.dtype == DType::f32) return dgrad_f32(p);
  const bool vectors = vectors_of(p.N, p.dy) && vectors_of(p.K, p.w);
  gx::launch("grouped_gemm_dgrad", dgrad_mma, grid_of(most_tiles("grouped_gemm", p.R, p.E, kTile, gx::ceil_div(p.K, kTile)), p.device),
             kThreads, shared_bytes(p.E), p.device, p, vectors);
}

void grouped_gemm_wgrad(const GroupedGemmWgradParams& p) {
  if (p.dtype == DType::f32) return wgrad_f32(p);
  const bool vectors = vectors_of(p.N, p.dy) && vectors_of(p.K, p.x);
  gx::launch("grouped_gemm_wgrad", wgrad_mma, grid_of(p.E * gx::ceil_div(p.N, kTile) * gx::ceil_div(p.K, kTile), p.device), kThreads,
             kSharedBytes, p.device, p, vectors);
}

void grouped_gemm_bias_grad(const GroupedGemmBiasGradParams& p) {
  const dim3 grid(static_cast<unsigned>(gx::ceil_div(p.N, kThreads)), static_cast<unsigned>(p.E));
  gx::launch("grouped_gemm_bias_grad", p.dtype == DType::bf16 ? bias_gradient<uint16_t> : bias_gradient<float>, grid, kThreads, 0, p.device,
             p);
}

}  // namespace glmx::gpu
