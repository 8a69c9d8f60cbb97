// sum_squares: kernel choice, and the sum of the chunks in order.
#include "core/dispatch.h"
#include "cpu/kernels.h"
#include "ops/registry.h"

namespace glmx {
namespace {
using Chunks = void(const SumSquaresParams&);
constexpr Kernel<Chunks> kChunks[] = {
    {Isa::avx512, cpu::avx512::sum_squares}, {Isa::avx2, cpu::avx2::sum_squares}, {Isa::base, cpu::base::sum_squares}};
}  // namespace

OpInfo sum_squares_info() { return op_info("sum_squares", "", kSumSquaresRevision, kChunks); }

void sum_squares(const SumSquaresParams& p) {
  select(kChunks).fn(p);
  double sum = 0.0;
  for (int64_t c = 0; c < (p.n + kSumSquaresChunk - 1) / kSumSquaresChunk; ++c) sum += p.partial[c];
  *p.out = sum;
}

}  // namespace glmx
