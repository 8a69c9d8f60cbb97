// rope: cos and sin of position * theta^(-i / half), and the rotation of the first 2 * half dims of every head
// Contract   include/glmx/ops.h RopeCosSinParams, RopeParams   Oracle reference/rope.py   Doc docs/ops/rope.md
// Shapes     positions [T] i64 | cos, sin [T,half] f32 | x, y [T,A,D] dtype row-major, y may be x
// Layout     pairs (i, i + half), or (2i, 2i + 1) rotated in place by a swap of neighbour lanes; tails on masked lanes
// Numerics   angles: fp64 pairs (106 bits) up to the reduction by pi/2, fp64 series after it: fp32 results are correctly rounded but for
//            near-ties, at any position below 2^31. Rotation: each product and each sum rounded to dtype (Hugging Face order)
// Algorithm  work item = 64 tokens (angles) or 16 tokens (rotation); angles eight at a time, rotation sixteen elements, heads innermost
// Work/bytes angles about 60*T*half flop fp64; rotation 6*T*A*half flop, 2*T*A*D elements: bound by memory
// Measured   angles 46 ns per token of 32 pairs (AVX2 61); rotation 49 ns per token of 4 x 64 bf16, half of it turning, 100 interleaved
//            (AVX2 61 and 98): one thread of a shared Zen 4 machine, processor time
// Limits     half >= 1, 2 * half <= D; host checks in ops/rope.cpp
#include "cpu/inl/math64.inl"
#include "cpu/inl/rows.inl"

constexpr int64_t kAngleTokens = 64, kRopeTokens = 16;

// An unevaluated sum of two fp64 numbers, lo below half a unit in the last place of hi.
struct Pair64 {
  double hi, lo;
};
inline Pair64 sum_of(double big, double small) {
  const double hi = big + small;
  return {hi, small - (hi - big)};
}
inline Pair64 product(Pair64 a, Pair64 b) {  // relative error below 2^-102
  const double p = a.hi * b.hi;
  const double error = fma64(a.hi, b.hi, -p);
  return sum_of(p, fma64(a.lo, b.hi, fma64(a.hi, b.lo, error)));
}

// theta^(-1 / half): an fp64 root from log64 and exp64, then one Newton step whose residual theta * root^half - 1 is taken in pairs.
inline Pair64 frequency_ratio(double theta, int64_t half) {
  const double root = exp64(-log64(theta) / static_cast<double>(half));
  Pair64 power{theta, 0.0}, square{root, 0.0};
  for (int64_t k = half; k > 0; k >>= 1) {
    if ((k & 1) != 0) power = product(power, square);
    if (k > 1) square = product(square, square);
  }
  const double residual = (power.hi - 1.0) + power.lo;
  return sum_of(root, -root * residual / static_cast<double>(half));
}

struct CosSin {
  D8 cos, sin;
};

// Of position * (high + low). The product is an exact pair; n pi/2 is taken off by FMAs: the first difference is exact, because both of
// its terms are multiples of 2^-52 and it is below 1; pi/2 is held to 2^-107. Then Taylor series on [-pi/4, pi/4], to r^19 and r^18.
inline CosSin cos_sin(D8 position, D8 high, D8 low) {
  const D8 magic = set1d(0x1.8p+52), minus_one = set1d(-1.0), one = set1d(1.0);
  const D8 angle = mul(position, high);
  const D8 angle_low = fma(position, low, fma(position, high, mul(minus_one, angle)));
  const D8 turns = fma(angle, set1d(0x1.45f306dc9c883p-1), magic);  // 2 / pi; its low bits are the quadrant
  const D8 n = sub(turns, magic);
  const D8 first = fma(n, set1d(-0x1.921fb54442d18p+0), angle);
  const D8 r = add(first, fma(n, set1d(-0x1.1a62633145c07p-54), angle_low));
  const D8 z = mul(r, r);
  D8 s = set1d(-1.0 / 121645100408832000.0);  // 1/19!
  s = fma(s, z, set1d(1.0 / 355687428096000.0));
  s = fma(s, z, set1d(-1.0 / 1307674368000.0));
  s = fma(s, z, set1d(1.0 / 6227020800.0));
  s = fma(s, z, set1d(-1.0 / 39916800.0));
  s = fma(s, z, set1d(1.0 / 362880.0));
  s = fma(s, z, set1d(-1.0 / 5040.0));
  s = fma(s, z, set1d(1.0 / 120.0));
  s = fma(s, z, set1d(-1.0 / 6.0));
  s = fma(mul(s, z), r, r);
  D8 c = set1d(-1.0 / 6402373705728000.0);  // 1/18!
  c = fma(c, z, set1d(1.0 / 20922789888000.0));
  c = fma(c, z, set1d(-1.0 / 87178291200.0));
  c = fma(c, z, set1d(1.0 / 479001600.0));
  c = fma(c, z, set1d(-1.0 / 3628800.0));
  c = fma(c, z, set1d(1.0 / 40320.0));
  c = fma(c, z, set1d(-1.0 / 720.0));
  c = fma(c, z, set1d(1.0 / 24.0));
  c = fma(c, z, set1d(-0.5));
  c = fma(c, z, one);
  const D8 sine = select_bit(turns, 0, c, s), cosine = select_bit(turns, 0, s, c);
  return {select_bit(add(turns, one), 1, mul(minus_one, cosine), cosine), select_bit(turns, 1, mul(minus_one, sine), sine)};
}

inline void cos_sin_block(void* context, int64_t block) {
  const RopeCosSinParams& p = *static_cast<const RopeCosSinParams*>(context);
  const int64_t begin = block * kAngleTokens, end = min_i64(p.T, begin + kAngleTokens);
  const Pair64 ratio = frequency_ratio(p.theta, p.half);
  Pair64 frequency{1.0, 0.0};
  for (int64_t i = 0; i < p.half; i += 8) {
    double high[8], low[8];
    for (int j = 0; j < 8; ++j) {
      high[j] = frequency.hi;
      low[j] = frequency.lo;
      frequency = product(frequency, ratio);
    }
    const D8 high8 = load8(high), low8 = load8(low);
    const int n = static_cast<int>(min_i64(8, p.half - i));
    for (int64_t t = begin; t < end; ++t) {
      const CosSin r = cos_sin(set1d(static_cast<double>(p.positions[t])), high8, low8);
      store_f32_n(p.cos + t * p.half + i, r.cos, n);
      store_f32_n(p.sin + t * p.half + i, r.sin, n);
    }
  }
}

inline void rope_cos_sin_rows(const RopeCosSinParams& p) {
  parallel_items((p.T + kAngleTokens - 1) / kAngleTokens, p.T * p.half * 2, cos_sin_block, const_cast<RopeCosSinParams*>(&p));
}

// a' = a cos - b sin,  b' = b cos + a sin
template <class T>
void rotate_halves(const RopeParams& p, int64_t t) {
  const T* x = static_cast<const T*>(p.x) + t * p.A * p.D;
  T* y = static_cast<T*>(p.y) + t * p.A * p.D;
  for (int64_t i = 0; i < p.half; i += 16) {
    const int n = lanes(p.half - i);
    const V16 c = round_to(load_n(p.cos + t * p.half + i, n), x);
    V16 s = round_to(load_n(p.sin + t * p.half + i, n), x);
    if (p.inverse) s = sub(zero(), s);
    for (int64_t head = 0; head < p.A; ++head) {
      const T* xa = x + head * p.D + i;
      T* ya = y + head * p.D + i;
      fetch_ahead(xa + i);
      const V16 a = load_n(xa, n), b = load_n(xa + p.half, n);
      store_n(ya, sub(round_to(mul(a, c), x), round_to(mul(b, s), x)), n);
      store_n(ya + p.half, add(round_to(mul(b, c), x), round_to(mul(a, s), x)), n);
    }
  }
}

// The same on neighbours: y = x cos + swap(x) (-sin, sin).
template <class T>
void rotate_neighbours(const RopeParams& p, int64_t t) {
  const T* x = static_cast<const T*>(p.x) + t * p.A * p.D;
  T* y = static_cast<T*>(p.y) + t * p.A * p.D;
  const float sign = p.inverse ? -1.0f : 1.0f;
  for (int64_t i = 0; i < 2 * p.half; i += 16) {
    const int n = lanes(2 * p.half - i);
    float cos2[16] = {}, sin2[16] = {};
    for (int j = 0; j < n; ++j) {
      cos2[j] = p.cos[t * p.half + (i + j) / 2];
      sin2[j] = p.sin[t * p.half + (i + j) / 2] * (j % 2 == 0 ? -sign : sign);
    }
    const V16 c = round_to(load(cos2), x), s = round_to(load(sin2), x);
    for (int64_t head = 0; head < p.A; ++head) {
      fetch_ahead(x + head * p.D + i);
      const V16 a = load_n(x + head * p.D + i, n);
      store_n(y + head * p.D + i, add(round_to(mul(a, c), x), round_to(mul(swap_neighbours(a), s), x)), n);
    }
  }
}

template <class T>
void rope_block(void* context, int64_t block) {
  const RopeParams& p = *static_cast<const RopeParams*>(context);
  const int64_t end = min_i64(p.T, (block + 1) * kRopeTokens), rest = p.D - 2 * p.half;
  for (int64_t t = block * kRopeTokens; t < end; ++t) {
    if (p.interleaved) {
      rotate_neighbours<T>(p, t);
    } else {
      rotate_halves<T>(p, t);
    }
    if (rest == 0 || p.x == p.y) continue;
    for (int64_t head = 0; head < p.A; ++head) {
      const int64_t offset = (t * p.A + head) * p.D + 2 * p.half;
      std::memcpy(static_cast<T*>(p.y) + offset, static_cast<const T*>(p.x) + offset, rest * sizeof(T));
    }
  }
}

inline void rope_rows(const RopeParams& p) {
  parallel_items((p.T + kRopeTokens - 1) / kRopeTokens, p.T * p.A * p.D / 4,
                 p.dtype == DType::bf16 ? rope_block<uint16_t> : rope_block<float>, const_cast<RopeParams*>(&p));
}
