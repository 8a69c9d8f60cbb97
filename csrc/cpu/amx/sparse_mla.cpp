// sparse_mla / amx: the body of cpu/inl/sparse_mla.inl, bf16, with the products of tile_attend.h
// Contract   include/glmx/ops.h SparseMlaParams   Oracle reference/sparse_mla.py   Doc docs/ops/sparse_mla.md
// Shapes     as in cpu/inl/sparse_mla.inl, dtype bf16; fp32 has no AMX kernel and runs avx512
// Layout     gathered keys are left tiles as they lie; the heads of a token are packed once per item, values once per block of keys
// Numerics   one tile product is the GEMM tree of ops.h; everything between the products is the vector kernels' code
// Algorithm  that of sparse_mla.inl, with 16 heads a tile; d_kv runs on the FMA units
// Work/bytes as in sparse_mla.inl
// Measured   not measured on hardware; executed on the software twin of tile.h, bits equal to base (tests/cpp/ops)
// Limits     bf16 only; checked in ops/sparse_mla.cpp
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
#include "cpu/inl/sparse_mla.inl"

#include "cpu/amx/tile_attend.h"
}  // namespace

void sparse_mla(const SparseMlaParams& p) { mla_forward_of<TileUnit>(p); }
void sparse_mla_backward(const SparseMlaBackwardParams& p) { mla_backward_of<TileUnit>(p); }
}  // namespace glmx::cpu::amx
