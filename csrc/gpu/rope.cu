// rope / gpu: cos and sin of position * theta^(-i / half), and the rotation of the first 2 * half dims of every head
// Contract   include/glmx/ops.h RopeCosSinParams, RopeParams   Oracle cpu/inl/rope.inl, bit for bit   Doc docs/ops/rope.md
// Shapes     positions [T] i64 | cos, sin [T,half] f32 | x, y [T,A,D] dtype row-major, y may be x
// Layout     pairs (i, i + half), or (2i, 2i + 1); pieces of 16 bytes where D, half and the pointers allow it
// Numerics   angles: fp64 pairs (106 bits) up to the reduction by pi/2, fp64 series after it, the CPU's operations one by one.
//            Rotation: each product and each sum rounded to dtype (Hugging Face order)
// Algorithm  angles: a block is 32 tokens and 64 frequencies; its first thread multiplies the frequencies up from 1, because every one is
//            the product of the one before, then all threads take an angle after another.
//            Rotation: one thread = one piece of the pairs of a head, or one piece of the dims behind them, which are copied
// Work/bytes angles about 60*T*half flop fp64; rotation 6*T*A*half flop, 2*T*A*D elements: bound by memory
// Measured   ran on an H200 (docs/gpu.md), not timed there
// Limits     half >= 1 for angles, 2 * half <= D; host checks in ops/rope.cpp. Positions outside [0, 2^31) end the stream with an error
#include "gpu/gx/gx.h"
#include "gpu/gx/math.h"
#include "gpu/kernels.h"
#include "gpu/rows.h"

namespace glmx::gpu {
namespace {

constexpr int kAngleTokens = 32, kFrequencies = 64, kAngleThreads = 256;

// An unevaluated sum of two fp64 numbers, lo below half a unit in the last place of hi.
struct Pair64 {
  double hi, lo;
};
__device__ inline Pair64 sum_of(double big, double small) {
  const double hi = big + small;
  return {hi, small - (hi - big)};
}
__device__ inline Pair64 product(Pair64 a, Pair64 b) {
  const double p = a.hi * b.hi;
  const double error = gx::fma(a.hi, b.hi, -p);
  return sum_of(p, gx::fma(a.lo, b.hi, gx::fma(a.hi, b.lo, error)));
}

// theta^(-1 / half): an fp64 root from log64 and exp64, then one Newton step whose residual theta * root^half - 1 is taken in pairs.
__device__ inline Pair64 frequency_ratio(double theta, int64_t half) {
  const double root = gx::exp64(-gx::log64(theta) / static_cast<double>(half));
  Pair64 power{theta, 0.0}, square{root, 0.0};
  for (int64_t k = half; k > 0; k >>= 1) {
    if ((k & 1) != 0) power = product(power, square);
    if (k > 1) square = product(square, square);
  }
  const double residual = (power.hi - 1.0) + power.lo;
  return sum_of(root, -root * residual / static_cast<double>(half));
}

struct CosSin {
  double cos, sin;
};

// Of position * frequency. The product is an exact pair; n pi/2 is taken off by FMAs; then Taylor series on [-pi/4, pi/4].
// cpu/inl/rope.inl says why each step keeps its bound.
__device__ inline CosSin cos_sin(double position, Pair64 frequency) {
  const double angle = position * frequency.hi;
  const double angle_low = gx::fma(position, frequency.lo, gx::fma(position, frequency.hi, -1.0 * angle));
  const double turns = gx::fma(angle, 0x1.45f306dc9c883p-1, 0x1.8p+52);  // 2 / pi; its low bits are the quadrant
  const double n = turns - 0x1.8p+52;
  const double first = gx::fma(n, -0x1.921fb54442d18p+0, angle);
  const double r = first + gx::fma(n, -0x1.1a62633145c07p-54, angle_low);
  const double z = r * r;
  double s = -1.0 / 121645100408832000.0;  // 1/19!
  s = gx::fma(s, z, 1.0 / 355687428096000.0);
  s = gx::fma(s, z, -1.0 / 1307674368000.0);
  s = gx::fma(s, z, 1.0 / 6227020800.0);
  s = gx::fma(s, z, -1.0 / 39916800.0);
  s = gx::fma(s, z, 1.0 / 362880.0);
  s = gx::fma(s, z, -1.0 / 5040.0);
  s = gx::fma(s, z, 1.0 / 120.0);
  s = gx::fma(s, z, -1.0 / 6.0);
  s = gx::fma(s * z, r, r);
  double c = -1.0 / 6402373705728000.0;  // 1/18!
  c = gx::fma(c, z, 1.0 / 20922789888000.0);
  c = gx::fma(c, z, -1.0 / 87178291200.0);
  c = gx::fma(c, z, 1.0 / 479001600.0);
  c = gx::fma(c, z, -1.0 / 3628800.0);
  c = gx::fma(c, z, 1.0 / 40320.0);
  c = gx::fma(c, z, -1.0 / 720.0);
  c = gx::fma(c, z, 1.0 / 24.0);
  c = gx::fma(c, z, -0.5);
  c = gx::fma(c, z, 1.0);
  const uint64_t quadrant = gx::to_bits64(turns);
  const double sine = (quadrant & 1u) != 0 ? c : s, cosine = (quadrant & 1u) != 0 ? s : c;
  const bool cosine_negative = (gx::to_bits64(turns + 1.0) & 2u) != 0, sine_negative = (quadrant & 2u) != 0;
  return {cosine_negative ? -1.0 * cosine : cosine, sine_negative ? -1.0 * sine : sine};
}

__global__ void __launch_bounds__(kAngleThreads) cos_sin_cells(RopeCosSinParams p) {
  __shared__ Pair64 frequencies[kFrequencies];
  const int64_t begin = int64_t{blockIdx.y} * kFrequencies, left = p.half - begin;
  const int columns = left < kFrequencies ? static_cast<int>(left) : kFrequencies;
  if (threadIdx.x == 0) {
    const Pair64 ratio = frequency_ratio(p.theta, p.half);
    Pair64 frequency{1.0, 0.0};
    for (int64_t i = 0; i < begin + columns; ++i) {
      if (i >= begin) frequencies[i - begin] = frequency;
      frequency = product(frequency, ratio);
    }
  }
  gx::barrier();
  for (int cell = static_cast<int>(threadIdx.x); cell < kAngleTokens * columns; cell += kAngleThreads) {
    const int row = cell / columns, column = cell - row * columns;
    const int64_t t = int64_t{blockIdx.x} * kAngleTokens + row;
    if (t >= p.T) return;
    const int64_t position = p.positions[t];
    gx::require(position >= 0 && position < (int64_t{1} << 31));
    const CosSin r = cos_sin(static_cast<double>(position), frequencies[column]);
    p.cos[t * p.half + begin + column] = static_cast<float>(r.cos);
    p.sin[t * p.half + begin + column] = static_cast<float>(r.sin);
  }
}

// The first n fp32 at p, zeros behind them. kWide: p is aligned to 16 bytes where N is a multiple of 4, and n is N.
template <bool kWide, int N>
__device__ inline void load_angles(const float* p, int n, float (&v)[N]) {
  if constexpr (kWide && N % 4 == 0) {
#pragma unroll
    for (int j = 0; j + 4 <= N; j += 4) {
      const Piece<float> four = unpack(gx::load16(p + j), p);
#pragma unroll
      for (int k = 0; k < 4; ++k) v[j + k] = four.v[k];
    }
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = j < n ? p[j] : 0.0f;
  }
}

// a' = a cos - b sin,  b' = b cos + a sin, for pairs [i, i + n) of a head
template <class T, bool kWide>
__device__ inline void rotate_halves(const RopeParams& p, int64_t t, int64_t head, int64_t i, int n) {
  constexpr int kN = kPiece<T>;
  float c[kN], s[kN];
  load_angles<kWide>(p.cos + t * p.half + i, n, c);
  load_angles<kWide>(p.sin + t * p.half + i, n, s);
  const T* x = static_cast<const T*>(p.x) + head + i;
  Piece<T> a = load_piece<kWide>(x, n), b = load_piece<kWide>(x + p.half, n);
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    const float cosine = gx::round_to<T>(c[j]), rounded = gx::round_to<T>(s[j]), sine = p.inverse ? 0.0f - rounded : rounded;
    const float first = a.v[j], second = b.v[j];
    a.v[j] = gx::round_to<T>(first * cosine) - gx::round_to<T>(second * sine);
    b.v[j] = gx::round_to<T>(second * cosine) + gx::round_to<T>(first * sine);
  }
  T* y = static_cast<T*>(p.y) + head + i;
  store_piece<kWide>(y, a, n);
  store_piece<kWide>(y + p.half, b, n);
}

// The same on neighbours, y = x cos + swap(x) (-sin, sin), for elements [i, i + n) of a head; i and n are even.
template <class T, bool kWide>
__device__ inline void rotate_neighbours(const RopeParams& p, int64_t t, int64_t head, int64_t i, int n) {
  constexpr int kN = kPiece<T>;
  const float sign = p.inverse ? -1.0f : 1.0f;
  float c[kN / 2], s[kN / 2];
  load_angles<kWide>(p.cos + t * p.half + i / 2, n / 2, c);
  load_angles<kWide>(p.sin + t * p.half + i / 2, n / 2, s);
  const Piece<T> a = load_piece<kWide>(static_cast<const T*>(p.x) + head + i, n);
  Piece<T> out;
#pragma unroll
  for (int j = 0; j < kN; ++j) {
    const float cosine = gx::round_to<T>(c[j / 2]), sine = gx::round_to<T>(s[j / 2] * (j % 2 == 0 ? -sign : sign));
    out.v[j] = gx::round_to<T>(a.v[j] * cosine) + gx::round_to<T>(a.v[j ^ 1] * sine);
  }
  store_piece<kWide>(static_cast<T*>(p.y) + head + i, out, n);
}

// The pieces of a head: `turned` of them rotate, the rest are copied bit for bit.
template <class T, bool kWide>
__global__ void __launch_bounds__(kCutThreads) rope_pieces(RopeParams p, Cut cut, int turned, int of_head) {
  Place at;
  if (!find_place(cut, p.T, at)) return;
  const int h = at.piece / of_head, piece = at.piece - h * of_head;
  const int64_t head = (at.row * p.A + h) * p.D;
  if (piece < turned) {
    const int64_t i = int64_t{piece} * kPiece<T>;
    if (p.interleaved) {
      rotate_neighbours<T, kWide>(p, at.row, head, i, piece_length<T>(2 * p.half, piece));
    } else {
      rotate_halves<T, kWide>(p, at.row, head, i, piece_length<T>(p.half, piece));
    }
    return;
  }
  const int64_t rest = p.D - 2 * p.half, i = head + 2 * p.half + int64_t{piece - turned} * kPiece<T>;
  const T* from = static_cast<const T*>(p.x) + i;
  T* to = static_cast<T*>(p.y) + i;
  if constexpr (kWide) {
    gx::store16(to, gx::load16(from));
  } else {
    for (int j = 0; j < piece_length<T>(rest, piece - turned); ++j) to[j] = from[j];
  }
}

template <class T, bool kWide>
void rotate(const RopeParams& p) {
  const int64_t turned = pieces_of(p.interleaved ? 2 * p.half : p.half, kPiece<T>);
  const int64_t of_head = turned + (p.x == p.y ? 0 : pieces_of(p.D - 2 * p.half, kPiece<T>));
  const Cut cut = cut_rows("rope", p.T, p.A * of_head);
  gx::launch("rope", rope_pieces<T, kWide>, cut.grid, cut.threads, 0, p.device, p, cut, static_cast<int>(turned),
             static_cast<int>(of_head));
}

}  // namespace

void rope_cos_sin(const RopeCosSinParams& p) {
  const dim3 grid(static_cast<unsigned>(pieces_of(p.T, kAngleTokens)), static_cast<unsigned>(pieces_of(p.half, kFrequencies)));
  gx::launch("rope_cos_sin", cos_sin_cells, grid, kAngleThreads, 0, p.device, p);
}

void rope(const RopeParams& p) {
  const int64_t size = dtype_size(p.dtype), turned_bytes = (p.interleaved ? 2 * p.half : p.half) * size;
  // The angles of a piece are as long as it, or half as long where neighbours share them: their rows are aligned when its own are.
  const bool wide = wide_rows(p.D * size, p.x, p.y, p.cos, p.sin) && turned_bytes % 16 == 0;
  pick_rows(p.dtype, wide, [&](auto type, auto is_wide) { rotate<decltype(type), is_wide>(p); });
}

}  // namespace glmx::gpu
