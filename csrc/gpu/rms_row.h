// What the normalisations share: rows staged in shared memory and sixteen-lane chains over them.
//
// A block owns a few rows and stages them, because a row is walked in two shapes: its sums by sixteen lanes, element after element, and
// everything else by all threads in pieces of 16 bytes. So memory sees wide accesses, many in flight, and a single row (decode) is fast
// too. Rows that do not fit are walked where they are, by the same code.
#pragma once
#include "gpu/gx/gx.h"
#include "gpu/rows.h"

namespace glmx::gpu {
namespace {

constexpr int kNormThreads = 128, kHalfTeams = kNormThreads / gx::kRowLanes;
// Shared memory: what a block stages at most (every GPU grants a block 48 KB unasked; the last one holds what is static, padded to the
// alignment of what is not), and what several rows together may take, so that a multiprocessor holds ten or more blocks.
constexpr int64_t kStageMost = 47 * 1024, kStageRows = 16 * 1024;
// Few rows are spread over about this many blocks, one for each multiprocessor, before blocks own several.
constexpr int64_t kSpread = 128;

struct NormPlan {
  int rows, H;
  bool staged;
  size_t shared;
  dim3 grid;
};

// `tensors`: how many rows are staged for each row of the op. Sixteen elements between rows put the rows of a team's halves in different
// banks, and keep the rows aligned.
template <class T>
NormPlan plan_rows(const char* op, int64_t count, int64_t H, int tensors) {
  GLMX_CHECK(H < INT32_MAX / 2 && count < INT32_MAX, op, ": expected fewer than 2^30 columns and 2^31 rows: got ", H, " and ", count);
  const int64_t row_bytes = tensors * (H + gx::kRowLanes) * int64_t{sizeof(T)};
  int64_t rows = kStageRows / row_bytes < kHalfTeams ? kStageRows / row_bytes : kHalfTeams;
  rows = rows < count / kSpread ? rows : count / kSpread;
  rows = rows < 1 ? 1 : rows;
  const bool staged = row_bytes <= kStageMost;
  return {static_cast<int>(rows), static_cast<int>(H), staged, staged ? static_cast<size_t>(rows * row_bytes) : 0,
          dim3(static_cast<unsigned>(pieces_of(count, rows)))};
}

// Rows that a block owns: staged in shared memory or where they lie.
template <class T>
struct Rows {
  const T* first;
  int64_t stride;
  __device__ const T* row(int r) const { return first + r * stride; }
};

// f(row, first element, elements) for every piece of so many rows, one thread for each.
template <class T, class F>
__device__ inline void each_piece(int rows, int H, F f) {
  const int pieces = (H + kPiece<T> - 1) / kPiece<T>;
  for (int cell = static_cast<int>(threadIdx.x); cell < rows * pieces; cell += kNormThreads) {
    const int r = cell / pieces, i = (cell - r * pieces) * kPiece<T>;
    f(r, i, H - i < kPiece<T> ? H - i : kPiece<T>);
  }
}

// Begins to copy `rows` rows at `from` into `stage`; finish_stage waits for all copies of the block.
template <bool kWide, class T>
__device__ inline Rows<T> stage_rows(T* stage, const T* from, int rows, const NormPlan& plan) {
  if (!plan.staged) return {from, plan.H};
  const int64_t stride = plan.H + gx::kRowLanes;
  each_piece<T>(rows, plan.H, [&](int r, int i, int n) {
    T* to = stage + r * stride + i;
    const T* at = from + int64_t{r} * plan.H + i;
    if constexpr (kWide) {
      gx::copy_async16(to, at, true);
    } else {
      for (int j = 0; j < n; ++j) to[j] = at[j];
    }
  });
  return {stage, stride};
}
__device__ inline void finish_stage() {
  gx::commit();
  gx::wait<0>();
  gx::barrier();
}

// f(row, write) by each half team of so many rows; where the last team has one row, both halves compute it and the first writes.
template <class F>
__device__ inline void each_row(int rows, F f) {
  const int half = gx::lane() / gx::kRowLanes;
  for (int pair = 2 * gx::team(); pair < rows; pair += kHalfTeams) {
    const bool own = pair + half < rows;
    f(own ? pair + half : pair, own && gx::lane() % gx::kRowLanes == 0);
  }
}

// step(element, inside) over the elements of this lane in ascending order. As on the CPU, lanes past the end of the row take a step too,
// of zeros: it shows where zero times a scale is NaN.
template <class F>
__device__ inline void each_link(int H, F step) {
  const int lane = gx::lane() % gx::kRowLanes, whole = H / gx::kRowLanes * gx::kRowLanes;
#pragma unroll 8
  for (int i = 0; i < whole; i += gx::kRowLanes) step(i + lane, true);
  if (whole < H) step(whole + lane, whole + lane < H);
}

template <class T>
__device__ inline float load_link(const T* row, int i, bool inside, float outside = 0.0f) {
  return inside ? gx::load(row + i) : outside;
}

__device__ inline float reciprocal_root(float mean_plus_eps) { return 1.0f / gx::sqrt(mean_plus_eps); }

// rms_norm of rows that are staged: y = weight * round(x * rstd). All threads of the block call it after finish_stage.
template <bool kWide, class T>
__device__ inline void normalise_rows(Rows<T> x, const T* weight, T* y, float* rstd, int rows, float eps, const NormPlan& plan) {
  __shared__ float scale[kHalfTeams];
  each_row(rows, [&](int r, bool write) {
    const T* row = x.row(r);
    float sum = 0.0f;
    each_link(plan.H, [&](int i, bool inside) {
      const float a = load_link(row, i, inside);
      sum = gx::fma(a, a, sum);
    });
    const float root = reciprocal_root(gx::fold_add(sum) / static_cast<float>(plan.H) + eps);
    if (!write) return;
    scale[r] = root;
    if (rstd != nullptr) rstd[r] = root;
  });
  gx::barrier();
  each_piece<T>(rows, plan.H, [&](int r, int i, int n) {
    Piece<T> a = load_piece<kWide>(x.row(r) + i, n);
    const Piece<T> w = load_piece<kWide>(weight + i, n);
#pragma unroll
    for (int j = 0; j < kPiece<T>; ++j) a.v[j] = w.v[j] * gx::round_to<T>(a.v[j] * scale[r]);
    store_piece<kWide>(y + int64_t{r} * plan.H + i, a, n);
  });
}

// Rows that block number blockIdx.x owns.
__device__ inline int rows_here(int64_t T, const NormPlan& plan) {
  const int64_t left = T - int64_t{blockIdx.x} * plan.rows;
  return left < plan.rows ? static_cast<int>(left) : plan.rows;
}

}  // namespace
}  // namespace glmx::gpu
