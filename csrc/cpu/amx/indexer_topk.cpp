// indexer_topk / amx: the body of cpu/inl/indexer_topk.inl, bf16, with products on tiles
// Contract   include/glmx/ops.h IndexerTopkParams   Oracle reference/indexer_topk.py   Doc docs/ops/indexer_topk.md
// Shapes     as in cpu/inl/indexer_topk.inl, dtype bf16; fp32 has no AMX kernel and runs avx512
// Layout     the heads of each token of an item are left tiles; 32 keys at a time are packed as right tiles and meet all tokens of the item
// Numerics   one tile product is the GEMM tree of ops.h; scores, selection and merging are the vector kernels' code
// Algorithm  that of indexer_topk.inl
// Work/bytes as in indexer_topk.inl
// Measured   not measured on hardware; executed on the software twin of tile.h, lists equal to base (tests/cpp/ops)
// Limits     bf16 only; checked in ops/indexer_topk.cpp
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/fatal.h"
#include "core/parallel.h"
#include "core/workspace.h"
#include "cpu/kernels.h"

namespace glmx::cpu::amx {
namespace {
#include "cpu/avx512/vec.h"

constexpr int kRows = 4, kVecs = 2;  // as avx512

#include "cpu/amx/tile.h"
#include "cpu/avx512/transpose.h"
#include "cpu/inl/indexer_topk.inl"

#include "cpu/amx/tile_product.h"

struct TileProducts {
  using T = uint16_t;
  using Session = TileSession;
  static constexpr int64_t kKeys = 32;
  int64_t heads, depth, steps;
  uint16_t *queries, *keys;  // left tiles [token][heads / 32][steps][2]; right tiles [2][steps]
  TileProducts(Pieces& pieces, int64_t tokens, int64_t Hi, int64_t Di) : heads(Hi), depth(Di), steps((Di + 31) / 32) {
    queries = as_halves(pieces.take(tokens * token_halves() / 2));
    keys = as_halves(pieces.take(2 * steps * kTile / 2));
  }
  int64_t token_halves() const { return round_up(heads, 32) / 32 * steps * 2 * kTile; }
  void pack_token(int64_t i, const T* q) {
    uint16_t* tile = queries + i * token_halves();
    for (int64_t h = 0; h < heads; h += 32) {
      for (int64_t b = 0; b < steps; ++b) {
        for (int64_t half = h; half < h + 32; half += 16, tile += kTile) {
          copy_left_tile([&](int64_t row) { return q + (half + row) * depth + b * 32; }, heads - half, least(32, depth - b * 32), tile);
        }
      }
    }
  }
  void pack_keys(const T* k, int64_t n) {
    for (int64_t half = 0; half < 32; half += 16) {
      for (int64_t b = 0; b < steps; ++b) {
        const auto row = [&](int64_t key) { return k + (half + key) * depth + b * 32; };
        transpose_right_tile(row, n - half, least(32, depth - b * 32), keys + (half / 16 * steps + b) * kTile);
      }
    }
  }
  int64_t calls() const { return (heads + 31) / 32; }
  template <class Meanwhile>
  void multiply(int64_t i, float* out, Meanwhile& meanwhile) const {
    for (int64_t h = 0; h < heads; h += 32) {
      meanwhile().done();
      const Left left{nullptr, 0, 0, queries + i * token_halves() + h / 32 * steps * 2 * kTile};
      tile_product_of(heads - h, kKeys, left, keys, keys + steps * kTile, steps, true, out + h * kKeys, kKeys);
    }
  }
};
}  // namespace

void indexer_topk(const IndexerTopkParams& p) { index_forward_of<TileProducts>(p); }
}  // namespace glmx::cpu::amx
