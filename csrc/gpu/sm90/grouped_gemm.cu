// grouped_gemm / gpu/sm90: out[r,:] = x[token(r),:] @ w[e(r)]^T on Hopper, bf16: TMA, mbarriers, wgmma
// Contract   include/glmx/ops.h GroupedGemmParams   Oracle reference/grouped_gemm.py   Doc docs/ops/grouped_gemm.md
// Shapes     x [M,K] | w [E,N,K] bf16, K a multiple of 8, 16-byte aligned | expert_offsets [E+1] i32 | out [R,N] bf16 or f32
// Layout     a stage is 64 k of 256 rows of w (by TMA; with silu_mul 128 gate rows and the 128 up rows beside them) and of kRows rows of x
//            (by TMA, or by cp.async where rows are gathered: Hopper's TMA has no gather), 128 bytes a row, swizzled as wgmma reads them
// Numerics   wgmma m64nNk16, k in order, padded with zeros to 64; fp32 sums; one rounding. Tiles of many rows have tokens down and weights
//            across, tiles of few rows the other way round: one H200 gave the same bits for both and for mma.sync (docs/gpu_facts.jsonl)
// Algorithm  warpgroup 0 loads, warpgroups 1 and 2 multiply: tiles of 128 tokens x 256 columns (64 tokens each), or of 256 columns x 16 or
//            64 tokens (each has two times 64 columns, with silu_mul gate and up). A ring of stages under mbarriers runs on from tile to
//            tile, so the loads of a tile overlap the stores of the one before. As many blocks as multiprocessors
// Work/bytes 2*M*N*K flop; M*K + E*N*K + M*N elements: bound by the matrix unit above about 190 rows an expert (740 TFLOP/s, 4 TB/s)
// Measured   H200: 660 to 770 TFLOP/s from 1024 rows an expert on (torch's matmul of 8192^3: 737), gathered 540 to 680, with silu_mul 470
//            to 590 (its exp and division wait for nothing but are waited for); decode of one token reads weights at 3.4 TB/s, of 16 at
//            4.2 TB/s (a copy-free read: 4.29)
// Limits     what sm90_takes refuses runs grouped_gemm.cu: the choice is one of card, weights and alignment, never of the rows
#include "gpu/gemm_paths.h"
#include "gpu/gemm_tiles.h"
#include "gpu/gx/hopper.h"

#if GX_HOPPER_PATHS

namespace glmx::gpu {
namespace {

constexpr int kColumns = 256;  // rows of w of a tile
constexpr int kDepth = 64;     // k of a stage: 128 bytes, the width of the swizzle
constexpr int kGroup = 128;    // threads of a warpgroup
constexpr int kThreads = 3 * kGroup;
constexpr int kWeightBytes = kColumns * kDepth * 2;
constexpr int kLoaderRegisters = 40, kMultiplierRegisters = 232;  // 128 * 40 + 256 * 232 = 64512 of the 65536
constexpr int kArrivals = 2 * kGroup / gx::kTeam;                 // a stage is free when each team of both multipliers has said so

// kRows: rows of x of a tile.
template <int kRows>
struct Shape {
  static constexpr bool kSwapped = kRows < 128;  // weights down, tokens across
  static constexpr int kStageBytes = kWeightBytes + kRows * kDepth * 2;
  static constexpr int kStages = kRows == 128 ? 4 : 5;
  static constexpr int kSharedBytes = kStages * kStageBytes;
};

struct Maps {
  gx::TensorMap w, x;  // x only where rows are not gathered
};

#if GX_HOPPER

// Which stage of the ring, and the parity of its barriers: loader and multipliers walk the same sequence.
template <int kStages>
struct Ring {
  int stage = 0, parity = 0;
  __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// One tile's x rows of a stage by cp.async: eight threads a row, sixteen rows a pass.
template <int kRows>
struct Gather {
  static constexpr int kPasses = kRows / 16;
  int32_t token[kPasses];  // -1 past the expert's rows

  __device__ void find(const GroupedGemmParams& p, const Tile& t) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int64_t r = pass * 16 + static_cast<int>(threadIdx.x) / 8;
      token[pass] = r < t.rows ? p.row_token[t.row + r] : -1;
    }
  }
  __device__ void load(const GroupedGemmParams& p, unsigned char* shared, int64_t k) const {
    const int row = static_cast<int>(threadIdx.x) / 8, chunk = static_cast<int>(threadIdx.x) % 8, offset = row * 128 + chunk * 16;
    unsigned char* const to = shared + (offset ^ ((offset >> 3) & 0x70));
    const uint16_t* const x = static_cast<const uint16_t*>(p.x) + k + chunk * 8;
    const bool inside = k + chunk * 8 < p.K;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const bool valid = inside && token[pass] >= 0;
      gx::copy_async16(to + pass * 16 * 128, valid ? x + token[pass] * p.K : p.x, valid);
    }
  }
};

// The loader, threads 0..127. A stage of gathered rows is full when the TMA's bytes and all 128 threads' copies are there: nobody waits for
// them here, the copies themselves arrive.
template <int kRows, bool kGathered>
__device__ void load_tiles(const GroupedGemmParams& p, const Maps& maps, const RowTiles& tiles, unsigned char* stages, uint64_t* full,
                           uint64_t* empty) {
  using S = Shape<kRows>;
  const bool leader = threadIdx.x == 0;
  if (!kGathered && !leader) return;
  const int64_t steps = gx::ceil_div(p.K, kDepth), half = p.silu_mul ? p.N / 2 : kColumns / 2;
  Ring<S::kStages> ring;
  for (int index = static_cast<int>(blockIdx.x); index < tiles.count(); index += static_cast<int>(gridDim.x)) {
    const Tile t = tiles.tile(index);
    const int row_of_w = t.expert * static_cast<int>(p.N) + t.column;
    Gather<kRows> gather;
    if (kGathered) gather.find(p, t);
    for (int64_t step = 0; step < steps; ++step) {
      unsigned char* const w = stages + ring.stage * S::kStageBytes;
      unsigned char* const x = w + kWeightBytes;
      const int k = static_cast<int>(step * kDepth);
      gx::mbarrier_wait(&empty[ring.stage], ring.parity ^ 1);
      if (leader) {
        gx::mbarrier_expect(&full[ring.stage], kGathered ? kWeightBytes : S::kStageBytes);
        gx::tma_load(w, &maps.w, &full[ring.stage], k, row_of_w);
        gx::tma_load(w + kWeightBytes / 2, &maps.w, &full[ring.stage], k, row_of_w + static_cast<int>(half));
        if (!kGathered) gx::tma_load(x, &maps.x, &full[ring.stage], k, t.row);
      }
      if (kGathered) {
        gather.load(p, x, k);
        gx::mbarrier_arrive_copies(&full[ring.stage]);
      }
      ring.next();
    }
  }
}

// Four words of four lanes, transposed: word i of lane j goes to word j of lane i, among the four lanes that share a row of sums.
__device__ void transpose4(uint32_t (&word)[4]) {
  const bool upper = gx::lane() & 2, odd = gx::lane() & 1;
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = gx::shuffle_xor(upper ? word[i] : word[i + 2], 2);
    (upper ? word[i] : word[i + 2]) = got;
  }
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = gx::shuffle_xor(odd ? word[i] : word[i + 1], 1);
    (odd ? word[i] : word[i + 1]) = got;
  }
}

// Columns [column, column + 8 * kEights) of the two rows of a 64 x N product that this thread has: row and row + 8. value(i) is the result
// of sum i. Of bf16 a lane stores 16 bytes at a time, of fp32 two neighbours, four lanes 32 bytes. width: of a row of the matrix; limit: no
// column from there on.
template <int kEights, class Value>
__device__ void store_sums(void* matrix, DType dtype, int64_t width, int64_t row, int64_t last_row, int64_t column, int64_t limit,
                           const Value& value) {
  // Addresses are one pointer for each of the two rows and offsets known to the compiler: registers are short here.
  const int quad = gx::lane() % 4;
  if (dtype == DType::f32) {
    float* const out = static_cast<float*>(matrix) + row * width + column + quad * 2;
    float* const below = out + 8 * width;
    const int left = static_cast<int>(limit - column) - quad * 2;
    const bool first = row < last_row, second = row + 8 < last_row;
#pragma unroll
    for (int i = 0; i < kEights * 4; ++i) {
      const int at = i / 4 * 8 + i % 2;
      if ((i / 2 % 2 == 0 ? first : second) && at < left) (i / 2 % 2 == 0 ? out : below)[at] = value(i);
    }
    return;
  }
  uint16_t* const out = static_cast<uint16_t*>(matrix) + row * width + column + quad * 8;
  uint16_t* const below = out + 8 * width;
  const int left = static_cast<int>(limit - column) - quad * 8;
  const bool first = row < last_row, second = row + 8 < last_row;
#pragma unroll
  for (int eight = 0; eight < kEights; eight += 4) {
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = (eight + i) * 4 + lower * 2;
        word[i] = gx::pack(value(at), value(at + 1));
      }
      transpose4(word);
      if ((lower == 0 ? first : second) && eight * 8 < left) {
        gx::store16((lower == 0 ? out : below) + eight * 8, {{word[0], word[1], word[2], word[3]}});
      }
    }
  }
}

// Columns past `limit` are never stored.
template <int kEights>
__device__ void add_bias(const GroupedGemmParams& p, const Tile& t, int64_t first, int64_t limit, float* c) {
#pragma unroll
  for (int i = 0; i < kEights * 4; ++i) {
    const int64_t column = first + gx::wgmma_col(i);
    if (column < limit) c[i] = c[i] + load_model(p.bias, DType::bf16, int64_t{t.expert} * p.N + column);
  }
}

// Tokens down: this warpgroup's 64 x 256 sums. With silu_mul columns 0..127 are gate and 128..255 up.
template <bool kSiluMul>
__device__ void store_tall(const GroupedGemmParams& p, const Tile& t, int first, float (&c)[kColumns / 2]) {
  constexpr int kAll = kColumns / 8, kGate = kAll / 2;
  const int64_t row = t.row + first + gx::wgmma_row(0), last = t.row + t.rows, half = p.N / 2;
  if constexpr (!kSiluMul) {
    if (p.bias != nullptr) add_bias<kAll>(p, t, t.column, p.N, c);
    store_sums<kAll>(p.out, p.out_dtype, p.N, row, last, t.column, p.N, [&](int i) { return c[i]; });
  } else {
    float* const up = c + kGate * 4;
    if (p.bias != nullptr) {
      add_bias<kGate>(p, t, t.column, half, c);
      add_bias<kGate>(p, t, half + t.column, p.N, up);
    }
    if (p.preact != nullptr) {
      store_sums<kGate>(p.preact, DType::bf16, p.N, row, last, t.column, half, [&](int i) { return c[i]; });
      store_sums<kGate>(p.preact, DType::bf16, p.N, row, last, half + t.column, p.N, [&](int i) { return up[i]; });
    }
    // The products wait for this, so it takes the short form where the whole team's gates allow it.
    bool plain = true;
#pragma unroll
    for (int i = 0; i < kGate * 4; ++i) plain = plain && gx::moderate(c[i]);
    if (gx::ballot(plain) == 0xffffffffu) {
#pragma unroll
      for (int i = 0; i < kGate * 4; ++i) c[i] = gx::silu_of_moderate(c[i]) * up[i];
    } else {
#pragma unroll
      for (int i = 0; i < kGate * 4; ++i) c[i] = gx::silu_mul(c[i], up[i]);
    }
    store_sums<kGate>(p.out, DType::bf16, half, row, last, t.column, half, [&](int i) { return c[i]; });
  }
}

// Weights down: two times 64 columns x kRows tokens; the second 64 are 128 columns on, or with silu_mul the up of the first.
template <int kRows>
__device__ void store_wide(const GroupedGemmParams& p, const Tile& t, int first, float (&c)[2][kRows / 2], int64_t columns) {
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) {
    const int64_t row = t.row + gx::wgmma_col(i), column = t.column + first + gx::wgmma_row(i);
    if (row >= t.row + t.rows) continue;
    if (column < columns) store_forward(p, t.expert, row, column, c[0][i], c[1][i]);
    if (!p.silu_mul && column + kColumns / 2 < columns) store_forward(p, t.expert, row, column + kColumns / 2, c[1][i], 0.0f);
  }
}

// The multipliers, threads 128..383. A stage is given back when the products that read it are done, which is known one stage later.
template <int kRows, bool kGathered, bool kSiluMul>
__device__ void multiply_tiles(const GroupedGemmParams& p, const RowTiles& tiles, unsigned char* stages, uint64_t* full, uint64_t* empty) {
  using S = Shape<kRows>;
  const int group = static_cast<int>(threadIdx.x) / kGroup - 1, first = group * 64;
  const bool speaker = gx::lane() == 0;
  const int64_t steps = gx::ceil_div(p.K, kDepth), columns = p.silu_mul ? p.N / 2 : p.N;
  Ring<S::kStages> ring;
  for (int index = static_cast<int>(blockIdx.x); index < tiles.count(); index += static_cast<int>(gridDim.x)) {
    const Tile t = tiles.tile(index);
    float c[S::kSwapped ? 2 : 1][S::kSwapped ? kRows / 2 : kColumns / 2];
    const auto multiply = [&](bool onto) {
      const unsigned char* const w = stages + ring.stage * S::kStageBytes;
      const unsigned char* const x = w + kWeightBytes;
      gx::mbarrier_wait(&full[ring.stage], ring.parity);
      if (kGathered) gx::fence_async();  // wgmma is to see what cp.async wrote
      for (auto& sums : c) gx::wgmma_hold(sums);
      gx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kDepth; k += 16) {
        if constexpr (S::kSwapped) {
          const uint64_t tokens = gx::operand(x + k * 2);
          gx::wgmma<kRows>(c[0], gx::operand(w + first * 128 + k * 2), tokens, onto || k > 0);
          gx::wgmma<kRows>(c[1], gx::operand(w + kWeightBytes / 2 + first * 128 + k * 2), tokens, onto || k > 0);
        } else {
          gx::wgmma<kColumns>(c[0], gx::operand(x + first * 128 + k * 2), gx::operand(w + k * 2), onto || k > 0);
        }
      }
      gx::wgmma_commit();
    };
    multiply(false);
    int before = ring.stage;
    ring.next();
    for (int64_t step = 1; step < steps; ++step) {
      multiply(true);
      gx::wgmma_wait<1>();
      if (speaker) gx::mbarrier_arrive(&empty[before]);
      before = ring.stage;
      ring.next();
    }
    gx::wgmma_wait<0>();
    for (auto& sums : c) gx::wgmma_hold(sums);
    if (speaker) gx::mbarrier_arrive(&empty[before]);
    if constexpr (S::kSwapped) {
      store_wide<kRows>(p, t, first, c, columns);
    } else {
      store_tall<kSiluMul>(p, t, first, c[0]);
    }
  }
}

#endif

template <int kRows, bool kGathered, bool kSiluMul>
__global__ void __launch_bounds__(kThreads, 1) forward_wgmma(const GroupedGemmParams p, const __grid_constant__ Maps maps) {
#if GX_HOPPER
  using S = Shape<kRows>;
  GX_DYNAMIC_SHARED(unsigned char, stages);
  __shared__ uint64_t full[S::kStages], empty[S::kStages];
  int32_t* const first = reinterpret_cast<int32_t*>(stages + S::kSharedBytes);
  if (threadIdx.x == 0) {
    for (int s = 0; s < S::kStages; ++s) {
      gx::mbarrier_init(&full[s], kGathered ? 1 + kGroup : 1);
      gx::mbarrier_init(&empty[s], kArrivals);
    }
    gx::mbarrier_init_done();
    gx::prefetch_map(&maps.w);
    if (!kGathered) gx::prefetch_map(&maps.x);
  }
  if (kGathered) check_rows(p.row_token, p.expert_offsets, p.E, p.R, p.M);
  count_row_tiles(first, p.expert_offsets, p.E, p.R, kRows);
  gx::barrier();
  constexpr int width = kSiluMul ? kColumns / 2 : kColumns;
  const RowTiles tiles{
      first, p.expert_offsets, p.R, static_cast<int>(p.E), kRows, width, static_cast<int>(gx::ceil_div(kSiluMul ? p.N / 2 : p.N, width))};
  if (threadIdx.x < kGroup) {
    gx::registers_down<kLoaderRegisters>();
    load_tiles<kRows, kGathered>(p, maps, tiles, stages, full, empty);
  } else {
    gx::registers_up<kMultiplierRegisters>();
    multiply_tiles<kRows, kGathered, kSiluMul>(p, tiles, stages, full, empty);
    zero_forward(p, int64_t{blockIdx.x} * 2 * kGroup + threadIdx.x - kGroup, int64_t{gridDim.x} * 2 * kGroup);
  }
#endif
}

template <int kRows, bool kGathered, bool kSiluMul>
void launch_forward(const GroupedGemmParams& p) {
  using S = Shape<kRows>;
  const char* const name = "grouped_gemm";
  const int64_t columns = kSiluMul ? p.N / 2 : p.N, width = kSiluMul ? kColumns / 2 : kColumns;
  const int64_t tiles = most_tiles("grouped_gemm", p.R, p.E, kRows, gx::ceil_div(columns, width));
  const int64_t most = gx::properties(p.device.index).multiprocessors;
  const dim3 grid(static_cast<unsigned>(tiles < 1 ? 1 : tiles < most ? tiles : most));
  Maps maps{};
  maps.w = gx::tensor_map(name, p.w, p.E * p.N, p.K, p.K, kColumns / 2, kDepth);
  if (!kGathered) maps.x = gx::tensor_map(name, p.x, p.M, p.K, p.K, kRows, kDepth);
  gx::launch(name, forward_wgmma<kRows, kGathered, kSiluMul>, grid, kThreads,
             S::kSharedBytes + static_cast<size_t>(p.E + 1) * sizeof(int32_t), p.device, p, maps);
}

template <int kRows>
void launch_forward(const GroupedGemmParams& p) {
  if (p.row_token != nullptr) {
    p.silu_mul ? launch_forward<kRows, true, true>(p) : launch_forward<kRows, true, false>(p);
  } else {
    p.silu_mul ? launch_forward<kRows, false, true>(p) : launch_forward<kRows, false, false>(p);
  }
}

}  // namespace

bool sm90_takes(const GroupedGemmParams& p) {
  // Rows of w are coordinates of a tensor map: 32 bits. The tile counts of 4096 experts fit behind the stages.
  return gx::properties(p.device.index).architecture == 90 && p.K % 8 == 0 && aligned16(p.x) && aligned16(p.w) &&
         (!p.silu_mul || p.out_dtype == DType::bf16) && (p.silu_mul ? p.N / 2 : p.N) % 8 == 0 && aligned16(p.out) && aligned16(p.preact) &&
         p.E * p.N < (int64_t{1} << 31) && p.K < (int64_t{1} << 31) && p.E <= 4096;
}

// Tiles of few rows where experts have few: a token is at most once in an expert, so R rows over E experts bound what they get on average.
void sm90_forward(const GroupedGemmParams& p) {
  const int64_t average = gx::ceil_div(p.R, p.E);
  if (p.M <= 16 || average <= 8) {
    launch_forward<16>(p);
  } else if (p.M <= 64 || average <= 48) {
    launch_forward<64>(p);
  } else {
    launch_forward<128>(p);
  }
}

}  // namespace glmx::gpu

#endif
