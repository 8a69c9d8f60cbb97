// V16 / base: sixteen virtual fp32 lanes in plain C++. It defines the bits that avx2/vec.h and avx512/vec.h reproduce.
// The operations are IEEE single operations, one rounding each; nothing here may be reassociated or contracted.
// Included inside an anonymous namespace, after <emmintrin.h>, <cmath>, <cstdint>, <cstring>.

struct V16 {
  float lane[16];
};

#define GLMX_LANES for (int i = 0; i < 16; ++i)

inline V16 set1(float a) {
  V16 r;
  GLMX_LANES r.lane[i] = a;
  return r;
}
inline V16 zero() { return set1(0.0f); }

inline V16 load(const float* p) {
  V16 r;
  GLMX_LANES r.lane[i] = p[i];
  return r;
}
inline V16 load_n(const float* p, int n) {
  V16 r;
  GLMX_LANES r.lane[i] = i < n ? p[i] : 0.0f;
  return r;
}
inline void store(float* p, V16 a) { GLMX_LANES p[i] = a.lane[i]; }
inline void store_n(float* p, V16 a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a.lane[i];
}

inline float bf16_to_f32(uint16_t h) {
  const uint32_t bits = uint32_t{h} << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
// Round to nearest even; NaN stays NaN (quiet bit set).
inline uint16_t f32_to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline V16 load(const uint16_t* p) {
  V16 r;
  GLMX_LANES r.lane[i] = bf16_to_f32(p[i]);
  return r;
}
inline V16 load_n(const uint16_t* p, int n) {
  V16 r;
  GLMX_LANES r.lane[i] = i < n ? bf16_to_f32(p[i]) : 0.0f;
  return r;
}
inline void store(uint16_t* p, V16 a) { GLMX_LANES p[i] = f32_to_bf16(a.lane[i]); }
inline void store_n(uint16_t* p, V16 a, int n) {
  for (int i = 0; i < n; ++i) p[i] = f32_to_bf16(a.lane[i]);
}
inline V16 round_bf16(V16 a) {
  GLMX_LANES a.lane[i] = bf16_to_f32(f32_to_bf16(a.lane[i]));
  return a;
}

inline V16 add(V16 a, V16 b) {
  GLMX_LANES a.lane[i] = a.lane[i] + b.lane[i];
  return a;
}
inline V16 sub(V16 a, V16 b) {
  GLMX_LANES a.lane[i] = a.lane[i] - b.lane[i];
  return a;
}
inline V16 mul(V16 a, V16 b) {
  GLMX_LANES a.lane[i] = a.lane[i] * b.lane[i];
  return a;
}
inline V16 div(V16 a, V16 b) {
  GLMX_LANES a.lane[i] = a.lane[i] / b.lane[i];
  return a;
}
inline V16 fma(V16 a, V16 b, V16 c) {
  GLMX_LANES c.lane[i] = std::fma(a.lane[i], b.lane[i], c.lane[i]);
  return c;
}  // a * b + c
inline V16 sqrt(V16 a) {
  GLMX_LANES a.lane[i] = std::sqrt(a.lane[i]);
  return a;
}
// a < b ? yes : no. False for NaN.
inline V16 select_lt(V16 a, V16 b, V16 yes, V16 no) {
  GLMX_LANES no.lane[i] = a.lane[i] < b.lane[i] ? yes.lane[i] : no.lane[i];
  return no;
}
// Bit i: lane i of a == lane i of b. False for NaN.
inline uint32_t mask_eq(V16 a, V16 b) {
  uint32_t mask = 0;
  GLMX_LANES mask |= (a.lane[i] == b.lane[i] ? 1u : 0u) << i;
  return mask;
}
inline V16 set_lane(V16 a, int lane, float value) {
  a.lane[lane] = value;
  return a;
}
// Bit i: a < b in lane i. False for NaN.
inline uint32_t mask_lt(V16 a, V16 b) {
  uint32_t mask = 0;
  GLMX_LANES mask |= (a.lane[i] < b.lane[i] ? 1u : 0u) << i;
  return mask;
}
// The elements of `from` whose bits are set, side by side; `to` is not behind `from`, and 16 elements of it may be written.
template <class T>
inline void compress(const T* from, uint32_t mask, T* to) {
  for (; mask != 0; mask &= mask - 1) *to++ = from[__builtin_ctz(mask)];
}
inline V16 max(V16 a, V16 b) { return select_lt(a, b, b, a); }
// 2^a for whole numbers a in [-126, 127].
inline V16 pow2(V16 a) {
  GLMX_LANES {
    const uint32_t bits = (static_cast<uint32_t>(_mm_cvttss_si32(_mm_set_ss(a.lane[i]))) + 127u) << 23;
    std::memcpy(&a.lane[i], &bits, 4);
  }
  return a;
}
// x = m * 2^n with m in [sqrt(1/2), sqrt(2)), for normal x > 0; any bits for other x.
struct Binary {
  V16 m, n;
};
inline Binary split_binary(V16 x) {
  Binary r;
  GLMX_LANES {
    uint32_t bits;
    std::memcpy(&bits, &x.lane[i], 4);
    const int32_t n = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
    bits -= static_cast<uint32_t>(n) << 23;
    std::memcpy(&r.m.lane[i], &bits, 4);
    r.n.lane[i] = static_cast<float>(n);
  }
  return r;
}
// Lanes 2j and 2j + 1 exchanged.
inline V16 swap_neighbours(V16 a) {
  V16 r;
  GLMX_LANES r.lane[i] = a.lane[i ^ 1];
  return r;
}

// Folded 16 -> 8 -> 4 -> 2 -> 1: lane j with lane j + half.
inline float fold_add(V16 a) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.lane[i] = a.lane[i] + a.lane[i + half];
  return a.lane[0];
}
inline float fold_max(V16 a) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.lane[i] = a.lane[i] < a.lane[i + half] ? a.lane[i + half] : a.lane[i];
  return a.lane[0];
}
#undef GLMX_LANES
