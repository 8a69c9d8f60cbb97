// attention: checks and kernel choice.
#include "core/check.h"
#include "core/dispatch.h"
#include "cpu/kernels.h"
#include "ops/registry.h"
#include "ops/sequences.h"

namespace glmx {
namespace {
using Forward = void(const AttentionParams&);
using Backward = void(const AttentionBackwardParams&);
constexpr Kernel<Forward> kForward[] = {{Isa::amx, cpu::amx::attention},
                                        {Isa::avx512_bf16, cpu::avx512_bf16::attention},
                                        {Isa::avx512, cpu::avx512::attention},
                                        {Isa::avx2, cpu::avx2::attention},
                                        {Isa::base, cpu::base::attention}};
constexpr Kernel<Backward> kBackward[] = {{Isa::amx, cpu::amx::attention_backward},
                                          {Isa::avx512_bf16, cpu::avx512_bf16::attention_backward},
                                          {Isa::avx512, cpu::avx512::attention_backward},
                                          {Isa::avx2, cpu::avx2::attention_backward},
                                          {Isa::base, cpu::base::attention_backward}};

template <class Params>
void check(const char* op, const Params& p) {
  GLMX_CHECK(p.A >= 1 && p.G >= 1 && p.A % p.G == 0, op, ": expected q.shape[1] to be a multiple of k.shape[1]: got ", p.A, ", k has ",
             p.G);
  GLMX_CHECK(p.Dk >= 1 && p.Dv >= 1, op, ": expected rows of at least one value: got q.shape[2] == ", p.Dk, ", out.shape[2] == ", p.Dv);
  GLMX_CHECK(p.v != nullptr || p.Dv <= p.Dk, op, ": expected v_dim <= k.shape[2] == ", p.Dk, " without v: got ", p.Dv);
  GLMX_CHECK(p.scale - p.scale == 0.0f, op, ": expected a finite scale: got ", p.scale);
  check_sequences(op, p.sequences);
}
}  // namespace

OpInfo attention_info(DType operands) { return op_info("attention", kAttentionRevision, kForward, operands); }

void attention(const AttentionParams& p) {
  check("attention", p);
  select(kForward, p.dtype).fn(p);
}

void attention_backward(const AttentionBackwardParams& p) {
  check("attention_backward", p);
  GLMX_CHECK(p.sequences.cu_seqlens_k != nullptr, "attention_backward: expected cu_seqlens_k: paged keys have no gradient");
  select(kBackward, p.dtype).fn(p);
}

}  // namespace glmx
