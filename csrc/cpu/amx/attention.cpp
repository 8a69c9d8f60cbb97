// attention / amx: the body of cpu/inl/attention.inl, bf16, with the products of tile_attend.h
// Contract   include/glmx/ops.h AttentionParams   Oracle reference/attention.py   Doc docs/ops/attention.md
// Shapes     as in cpu/inl/attention.inl, dtype bf16; fp32 has no AMX kernel and runs avx512
// Layout     keys are read where they lie, as left tiles; queries are packed once per item, values once per block of keys
// Numerics   one tile product is the GEMM tree of ops.h; everything between the products is the vector kernels' code
// Algorithm  that of attention.inl, with 16 query rows a tile. Rows that see a part of a block, and the gradients of keys and values, run
//            on the FMA units
// Work/bytes as in attention.inl
// Measured   not measured on hardware; executed on the software twin of tile.h, bits equal to base (tests/cpp/ops)
// Limits     bf16 only; checked in ops/attention.cpp
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
#include "cpu/avx512/vec64.h"

constexpr int kRows = 4, kVecs = 2;  // as avx512

#include "cpu/amx/tile.h"
#include "cpu/avx512/transpose.h"
#include "cpu/inl/attention.inl"

#include "cpu/amx/tile_attend.h"
}  // namespace

void attention(const AttentionParams& p) { forward_of<TileUnit>(p); }
void attention_backward(const AttentionBackwardParams& p) { backward_of<TileUnit>(p); }
}  // namespace glmx::cpu::amx
