// grouped_gemm_f32 / gpu: grouped_gemm and its gradients with fp32 operands: the GEMM tree of ops.h, so the bits are the CPU's
// Contract   include/glmx/ops.h GroupedGemmParams   Oracle reference/gemm_tree.py   Doc docs/ops/grouped_gemm.md
// Shapes     x [M,K] | w [E,N,K] | dy [R,N] | dw [E,N,K] f32 | expert_offsets [E+1] i32
// Layout     blocks of 32 k of 64 rows of each operand in shared memory, rows 33 floats apart, element by element from any matrix
// Numerics   per block of 32 k: e = chain over even k, o = chain over odd k, C = C + (e + o); zeros pad k: cards and CPUs agree in bits
// Algorithm  256 threads own a tile of 64 x 64, 4 x 4 each; one stage
// Work/bytes 2*M*N*K flop: bound by fp32 FMA (a twelfth of the matrix unit's rate). fp32 models are for tests and routers' gates
// Measured   ran on an H200 (docs/gpu.md), not timed there
// Limits     as grouped_gemm.cu
#include "gpu/gemm_paths.h"
#include "gpu/gemm_tiles.h"

namespace glmx::gpu {
namespace {

constexpr int kTile = 64, kDepth = 32, kPitch = kDepth + 1, kThreads = 256, kPart = 4;

// Element (line, k) of an operand: line is a row of results or of weights, k the place in the reduction.
struct Operand {
  const float* base;
  const int32_t* gather;  // of the index with the row stride, or null
  int64_t line_stride, k_stride;
  int64_t lines, depth;  // what exists; the rest reads as zero
  bool gather_k;         // the gathered index is k, else the line
};

__device__ float element(const Operand& o, int64_t line, int64_t k) {
  if (line >= o.lines || k >= o.depth) return 0.0f;
  const int64_t at_line = o.gather != nullptr && !o.gather_k ? o.gather[line] : line;
  const int64_t at_k = o.gather != nullptr && o.gather_k ? o.gather[k] : k;
  return o.base[at_line * o.line_stride + at_k * o.k_stride];
}

// c[i][j]: rows (team part) thread / 16 + 16 i, columns thread % 16 + 16 j of the tile.
__device__ void multiply_tile(float (&c)[kPart][kPart], const Operand& a, const Operand& b, int64_t depth) {
  __shared__ float shared_a[kTile][kPitch], shared_b[kTile][kPitch];
  const int thread = static_cast<int>(threadIdx.x), row = thread / 16, column = thread % 16;
  for (int i = 0; i < kPart; ++i) {
    for (int j = 0; j < kPart; ++j) c[i][j] = 0.0f;
  }
  for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
    for (int i = thread; i < kTile * kDepth; i += kThreads) {
      // Neighbouring threads read along whichever index is dense.
      const int line_a = a.k_stride == 1 ? i / kDepth : i % kTile, k_a = a.k_stride == 1 ? i % kDepth : i / kTile;
      const int line_b = b.k_stride == 1 ? i / kDepth : i % kTile, k_b = b.k_stride == 1 ? i % kDepth : i / kTile;
      shared_a[line_a][k_a] = element(a, line_a, k0 + k_a);
      shared_b[line_b][k_b] = element(b, line_b, k0 + k_b);
    }
    gx::barrier();
    float even[kPart][kPart] = {}, odd[kPart][kPart] = {};
    for (int k = 0; k < kDepth; k += 2) {
      for (int i = 0; i < kPart; ++i) {
        for (int j = 0; j < kPart; ++j) {
          even[i][j] = gx::fma(shared_a[row + 16 * i][k], shared_b[column + 16 * j][k], even[i][j]);
          odd[i][j] = gx::fma(shared_a[row + 16 * i][k + 1], shared_b[column + 16 * j][k + 1], odd[i][j]);
        }
      }
    }
    for (int i = 0; i < kPart; ++i) {
      for (int j = 0; j < kPart; ++j) c[i][j] = c[i][j] + (even[i][j] + odd[i][j]);
    }
    gx::barrier();
  }
}

__device__ int tile_row(int i) { return static_cast<int>(threadIdx.x) / 16 + 16 * i; }
__device__ int tile_column(int j) { return static_cast<int>(threadIdx.x) % 16 + 16 * j; }

__global__ void __launch_bounds__(kThreads) forward_fma(const GroupedGemmParams p) {
  GX_DYNAMIC_SHARED(int32_t, first);
  check_rows(p.row_token, p.expert_offsets, p.E, p.R, p.M);
  count_row_tiles(first, p.expert_offsets, p.E, p.R, kTile);
  gx::barrier();
  const int64_t columns = p.silu_mul ? p.N / 2 : p.N;
  const RowTiles tiles{first, p.expert_offsets, p.R, static_cast<int>(p.E), kTile, kTile, static_cast<int>(gx::ceil_div(columns, kTile))};
  for (int index = static_cast<int>(blockIdx.x); index < tiles.count(); index += static_cast<int>(gridDim.x)) {
    const Tile t = tiles.tile(index);
    const float* x = static_cast<const float*>(p.x);
    const float* w = static_cast<const float*>(p.w) + (int64_t{t.expert} * p.N + t.column) * p.K;
    const bool gathered = p.row_token != nullptr;
    const Operand a{gathered ? x : x + int64_t{t.row} * p.K, gathered ? p.row_token + t.row : nullptr, p.K, 1, t.rows, p.K, false};
    float sum[kPart][kPart], up[kPart][kPart];
    multiply_tile(sum, a, {w, nullptr, p.K, 1, columns - t.column, p.K, false}, p.K);
    if (p.silu_mul) multiply_tile(up, a, {w + p.N / 2 * p.K, nullptr, p.K, 1, columns - t.column, p.K, false}, p.K);
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
#pragma unroll
      for (int j = 0; j < kPart; ++j) {
        if (tile_row(i) >= t.rows || t.column + tile_column(j) >= columns) continue;
        store_forward(p, t.expert, t.row + tile_row(i), t.column + tile_column(j), sum[i][j], p.silu_mul ? up[i][j] : 0.0f);
      }
    }
  }
  zero_forward(p, int64_t{blockIdx.x} * kThreads + threadIdx.x, int64_t{gridDim.x} * kThreads);
}

__global__ void __launch_bounds__(kThreads) dgrad_fma(const GroupedGemmDgradParams p) {
  GX_DYNAMIC_SHARED(int32_t, first);
  count_row_tiles(first, p.expert_offsets, p.E, p.R, kTile);
  gx::barrier();
  const RowTiles tiles{first, p.expert_offsets, p.R, static_cast<int>(p.E), kTile, kTile, static_cast<int>(gx::ceil_div(p.K, kTile))};
  for (int index = static_cast<int>(blockIdx.x); index < tiles.count(); index += static_cast<int>(gridDim.x)) {
    const Tile t = tiles.tile(index);
    const float* w = static_cast<const float*>(p.w) + int64_t{t.expert} * p.N * p.K + t.column;
    float sum[kPart][kPart];
    multiply_tile(sum, {static_cast<const float*>(p.dy) + int64_t{t.row} * p.N, nullptr, p.N, 1, t.rows, p.N, false},
                  {w, nullptr, 1, p.K, p.K - t.column, p.N, false}, p.N);
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
#pragma unroll
      for (int j = 0; j < kPart; ++j) {
        if (tile_row(i) >= t.rows || t.column + tile_column(j) >= p.K) continue;
        store_model(p.dx, p.out_dtype, int64_t{t.row + tile_row(i)} * p.K + t.column + tile_column(j), sum[i][j]);
      }
    }
  }
  zero_rows(p.dx, p.out_dtype, p.K, first_row(p.expert_offsets, p.E, p.R), p.R, int64_t{blockIdx.x} * kThreads + threadIdx.x,
            int64_t{gridDim.x} * kThreads);
}

__global__ void __launch_bounds__(kThreads) wgrad_fma(const GroupedGemmWgradParams p) {
  check_rows(p.row_token, p.expert_offsets, p.E, p.R, p.M);
  const int64_t down = gx::ceil_div(p.N, kTile), across = gx::ceil_div(p.K, kTile);
  for (int64_t index = blockIdx.x; index < p.E * down * across; index += gridDim.x) {
    const int64_t e = index / (down * across), n = index / across % down * kTile, k = index % across * kTile;
    const int64_t begin = first_row(p.expert_offsets, e, p.R), rows = first_row(p.expert_offsets, e + 1, p.R) - begin;
    if (rows == 0 && p.accumulate) continue;
    const float* x = static_cast<const float*>(p.x) + k;
    const bool gathered = p.row_token != nullptr;
    const Operand b{gathered ? x : x + begin * p.K, gathered ? p.row_token + begin : nullptr, 1, p.K, p.K - k, rows, true};
    float sum[kPart][kPart];
    multiply_tile(sum, {static_cast<const float*>(p.dy) + begin * p.N + n, nullptr, 1, p.N, p.N - n, rows, false}, b, rows);
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
#pragma unroll
      for (int j = 0; j < kPart; ++j) {
        if (n + tile_row(i) >= p.N || k + tile_column(j) >= p.K) continue;
        const int64_t at = (e * p.N + n + tile_row(i)) * p.K + k + tile_column(j);
        float* dw = static_cast<float*>(p.dw) + at;
        *dw = p.accumulate ? *dw + sum[i][j] : sum[i][j];
      }
    }
  }
}

dim3 grid_of(int64_t tiles, const Device& device) {
  const int64_t most = 4 * gx::properties(device.index).multiprocessors;
  return dim3(static_cast<unsigned>(tiles < 1 ? 1 : tiles < most ? tiles : most));
}
size_t shared_bytes(int64_t E) { return static_cast<size_t>(E + 1) * sizeof(int32_t); }

}  // namespace

void forward_f32(const GroupedGemmParams& p) {
  const int64_t tiles = most_tiles("grouped_gemm", p.R, p.E, kTile, gx::ceil_div(p.silu_mul ? p.N / 2 : p.N, kTile));
  gx::launch("grouped_gemm", forward_fma, grid_of(tiles, p.device), kThreads, shared_bytes(p.E), p.device, p);
}

void dgrad_f32(const GroupedGemmDgradParams& p) {
  const int64_t tiles = most_tiles("grouped_gemm", p.R, p.E, kTile, gx::ceil_div(p.K, kTile));
  gx::launch("grouped_gemm_dgrad", dgrad_fma, grid_of(tiles, p.device), kThreads, shared_bytes(p.E), p.device, p);
}

void wgrad_f32(const GroupedGemmWgradParams& p) {
  const int64_t tiles = p.E * gx::ceil_div(p.N, kTile) * gx::ceil_div(p.K, kTile);
  gx::launch("grouped_gemm_wgrad", wgrad_fma, grid_of(tiles, p.device), kThreads, 0, p.device, p);
}

}  // namespace glmx::gpu
