// Matrix fragments of a team, m16n8k16: the layout of PTX's mma and ldmatrix, which all three implementations keep. Included by each of
// them behind its threadIdx.
#pragma once

namespace gx {

struct FragA {
  uint32_t r[4];
};
struct FragB {
  uint32_t r[2];
};
struct FragC {
  float v[4];
  __device__ static int row(int i) { return static_cast<int>(threadIdx.x) % kTeam / 4 + i / 2 * 8; }
  __device__ static int col(int i) { return static_cast<int>(threadIdx.x) % 4 * 2 + i % 2; }
};

// Which element's address a lane passes. load_a, stored [m][k]: element (m, k) of the 16 x 16 tile.
__device__ inline int load_a_m() { return static_cast<int>(threadIdx.x) % 16; }
__device__ inline int load_a_k() { return static_cast<int>(threadIdx.x) % kTeam / 16 * 8; }
// load_a_transposed, stored [k][m].
__device__ inline int load_a_transposed_k() { return static_cast<int>(threadIdx.x) % 8 + static_cast<int>(threadIdx.x) % kTeam / 16 * 8; }
__device__ inline int load_a_transposed_m() { return static_cast<int>(threadIdx.x) / 8 % 2 * 8; }
// load_b_pair, two fragments, n 0..7 and 8..15, stored [n][k].
__device__ inline int load_b_n() { return static_cast<int>(threadIdx.x) % 8 + static_cast<int>(threadIdx.x) % kTeam / 16 * 8; }
__device__ inline int load_b_k() { return static_cast<int>(threadIdx.x) / 8 % 2 * 8; }
// load_b_pair_transposed, stored [k][n].
__device__ inline int load_b_transposed_k() { return static_cast<int>(threadIdx.x) % 16; }
__device__ inline int load_b_transposed_n() { return static_cast<int>(threadIdx.x) % kTeam / 16 * 8; }

}  // namespace gx
