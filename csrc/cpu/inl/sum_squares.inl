// sum_squares: the sum of x_i^2 in fp64
// Contract   include/glmx/ops.h SumSquaresParams   Oracle reference/sum_squares.py   Doc docs/ops/sum_squares.md
// Shapes     x [n] dtype | partial [ceil(n / 4096)], out [1] f64
// Layout     any contiguous shape, taken as one row; the last elements run the same code on masked lanes
// Numerics   a square of an fp32 is exact in fp64 (48 bits), so multiplying and adding rounds once, as an fma would; sixteen lanes over a
//            chunk of 4096 elements, folded, chunks added in order: a function of n alone
// Algorithm  an item is 16 chunks; the host adds the partial sums
// Work/bytes 2*n flop, n elements: bound by memory
// Measured   one core of a shared AMD EPYC (Zen 4), see docs/ops/sum_squares.md
// Limits     none

#include "cpu/inl/rows.inl"

constexpr int64_t kChunksPerItem = 16;  // 65536 elements, about 10 us

template <class T>
double chunk_squares(const T* x, int64_t n) {
  D8 low = set1d(0.0), high = set1d(0.0);
  for (int64_t i = 0; i < n; i += 16) {
    fetch_ahead(x + i);
    const V16 a = load_n(x + i, lanes(n - i));
    const D8 a_low = widen_low(a), a_high = widen_high(a);
    low = add(low, mul(a_low, a_low));
    high = add(high, mul(a_high, a_high));
  }
  return fold_add(add(low, high));
}

template <class T>
void square_chunks(void* context, int64_t item) {
  const SumSquaresParams& p = *static_cast<const SumSquaresParams*>(context);
  const int64_t chunks = (p.n + kSumSquaresChunk - 1) / kSumSquaresChunk, end = min_i64((item + 1) * kChunksPerItem, chunks);
  for (int64_t c = item * kChunksPerItem; c < end; ++c) {
    const int64_t begin = c * kSumSquaresChunk;
    p.partial[c] = chunk_squares(static_cast<const T*>(p.x) + begin, min_i64(kSumSquaresChunk, p.n - begin));
  }
}

inline void sum_squares_chunks(const SumSquaresParams& p) {
  const int64_t elements = kSumSquaresChunk * kChunksPerItem;
  void* context = const_cast<SumSquaresParams*>(&p);
  parallel_items((p.n + elements - 1) / elements, p.n / 6, p.dtype == DType::bf16 ? square_chunks<uint16_t> : square_chunks<float>,
                 context);
}
