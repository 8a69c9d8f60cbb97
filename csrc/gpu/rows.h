// What kernels that walk rows of model dtype share: pieces of 16 bytes, and how a grid is cut over rows and pieces.
// Included by kernel files alone; everything here has internal linkage.
#pragma once
#include <cstdint>
#include <type_traits>

#include "core/check.h"
#include "glmx/dtype.h"
#include "gpu/gx/gx.h"

namespace glmx::gpu {
namespace {

// What a thread handles at a time: 16 bytes of elements of type T, as fp32 numbers.
template <class T>
inline constexpr int kPiece = static_cast<int>(16 / sizeof(T));
template <class T>
struct Piece {
  float v[kPiece<T>];
};

__device__ inline Piece<float> unpack(gx::Vec16 raw, const float*) {
  Piece<float> a;
#pragma unroll
  for (int j = 0; j < 4; ++j) a.v[j] = gx::from_bits(raw.word[j]);
  return a;
}
__device__ inline Piece<uint16_t> unpack(gx::Vec16 raw, const uint16_t*) {
  Piece<uint16_t> a;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    a.v[2 * j] = gx::low(raw.word[j]);
    a.v[2 * j + 1] = gx::high(raw.word[j]);
  }
  return a;
}
__device__ inline gx::Vec16 pack(const Piece<float>& a) {
  gx::Vec16 raw;
#pragma unroll
  for (int j = 0; j < 4; ++j) raw.word[j] = gx::to_bits(a.v[j]);
  return raw;
}
__device__ inline gx::Vec16 pack(const Piece<uint16_t>& a) {
  gx::Vec16 raw;
#pragma unroll
  for (int j = 0; j < 4; ++j) raw.word[j] = gx::pack(a.v[2 * j], a.v[2 * j + 1]);
  return raw;
}

// The first n elements at p, zeros behind them. kWide: p is aligned to 16 bytes and n is kPiece. It is a constant of a kernel, because a
// branch around each load would keep the loads of a thread from being in flight together.
template <bool kWide, class T>
__device__ inline Piece<T> load_piece(const T* p, int n) {
  if constexpr (kWide) {
    return unpack(gx::load16(p), p);
  } else {
    Piece<T> a;
#pragma unroll
    for (int j = 0; j < kPiece<T>; ++j) a.v[j] = j < n ? gx::load(p + j) : 0.0f;
    return a;
  }
}
template <bool kWide, class T>
__device__ inline void store_piece(T* p, const Piece<T>& a, int n) {
  if constexpr (kWide) {
    gx::store16(p, pack(a));
  } else {
#pragma unroll
    for (int j = 0; j < kPiece<T>; ++j) {
      if (j < n) gx::store(p + j, a.v[j]);
    }
  }
}

inline int64_t pieces_of(int64_t n, int64_t piece) { return (n + piece - 1) / piece; }

// Whether rows of so many bytes that begin at these addresses can all be read in aligned pieces of 16 bytes.
template <class... Pointers>
inline bool wide_rows(int64_t row_bytes, const Pointers*... rows) {
  return row_bytes % 16 == 0 && (... && (reinterpret_cast<uintptr_t>(rows) % 16 == 0));
}

// run(T{}, std::bool_constant<kWide>{}) with the element type and the width of a call.
template <class F>
inline void pick_rows(DType dtype, bool wide, F run) {
  if (dtype == DType::bf16) {
    wide ? run(uint16_t{}, std::true_type{}) : run(uint16_t{}, std::false_type{});
  } else {
    wide ? run(float{}, std::true_type{}) : run(float{}, std::false_type{});
  }
}

// A grid with one thread for each (row, piece) of rows of `pieces` pieces: a block owns a few short rows, or a stretch of a long one.
// Threads of elementwise kernels handle one piece each: their loads need no loop, and full multiprocessors hide the latency.
inline constexpr int kCutThreads = 256;
struct Cut {
  int rows, across, pieces, threads;  // rows of a block; pieces of a row in a block; pieces of a row; threads of a block
  dim3 grid;
};
inline Cut cut_rows(const char* op, int64_t rows, int64_t pieces) {
  GLMX_CHECK(pieces < INT32_MAX && rows < INT32_MAX, op, ": expected fewer than 2^31 rows, of fewer than 2^31 pieces of 16 bytes: got ",
             rows, " and ", pieces);
  Cut cut{1, 1, static_cast<int>(pieces), gx::kBlockStep, dim3(0, 0)};
  if (rows == 0 || pieces == 0) return cut;
  const int64_t stretches = pieces_of(pieces, kCutThreads);
  cut.across = static_cast<int>(pieces_of(pieces, stretches));
  if (stretches == 1) cut.rows = kCutThreads / cut.across;
  cut.threads = static_cast<int>(pieces_of(cut.rows * cut.across, gx::kBlockStep)) * gx::kBlockStep;
  cut.grid = dim3(static_cast<unsigned>(pieces_of(rows, cut.rows)), static_cast<unsigned>(stretches));
  return cut;
}

// The thread's own (row, piece); false where it has none.
struct Place {
  int64_t row;
  int piece;
};
__device__ inline bool find_place(const Cut& cut, int64_t rows, Place& at) {
  const int cell = static_cast<int>(threadIdx.x), row = cell / cut.across;
  at.row = int64_t{blockIdx.x} * cut.rows + row;
  at.piece = static_cast<int>(blockIdx.y) * cut.across + cell - row * cut.across;
  return row < cut.rows && at.row < rows && at.piece < cut.pieces;
}

// Elements of a row of n that piece number `piece` has.
template <class T>
__device__ inline int piece_length(int64_t n, int piece) {
  const int64_t left = n - int64_t{piece} * kPiece<T>;
  return left < kPiece<T> ? static_cast<int>(left) : kPiece<T>;
}

}  // namespace
}  // namespace glmx::gpu
