// head_gemm and its weight gradient: checks and kernel choice.
#include "core/check.h"
#include "core/dispatch.h"
#include "cpu/kernels.h"
#include "ops/registry.h"

namespace glmx {
namespace {
using Forward = void(const HeadGemmParams&);
using Wgrad = void(const HeadGemmWgradParams&);
constexpr Kernel<Forward> kForward[] = {{Isa::amx, cpu::amx::head_gemm},
                                        {Isa::avx512_bf16, cpu::avx512_bf16::head_gemm},
                                        {Isa::avx512, cpu::avx512::head_gemm},
                                        {Isa::avx2, cpu::avx2::head_gemm},
                                        {Isa::base, cpu::base::head_gemm}};
constexpr Kernel<Wgrad> kWgrad[] = {{Isa::amx, cpu::amx::head_gemm_wgrad},
                                    {Isa::avx512_bf16, cpu::avx512_bf16::head_gemm_wgrad},
                                    {Isa::avx512, cpu::avx512::head_gemm_wgrad},
                                    {Isa::avx2, cpu::avx2::head_gemm_wgrad},
                                    {Isa::base, cpu::base::head_gemm_wgrad}};

void check_sizes(const char* op, int64_t A, int64_t N, int64_t K) {
  GLMX_CHECK(A >= 1 && N >= 1 && K >= 1, op, ": expected at least one head, N >= 1 and K >= 1: got ", A, " heads, N == ", N, ", K == ", K);
}

void check_dtypes(const char* op, DType dtype, DType out_dtype) {
  GLMX_CHECK(dtype == DType::bf16 || out_dtype == DType::f32, op, ": expected out_dtype fp32 with fp32 inputs: got ",
             dtype_name(out_dtype));
}

// Elements (i, j, k) at i * outer + j * inner + k, k < width: written ones must not overlap, whichever stride is the larger.
void check_apart(const char* op, const char* name, int64_t rows_i, int64_t outer, int64_t rows_j, int64_t inner, int64_t width) {
  const bool i_outside = outer >= inner;
  const int64_t near = i_outside ? inner : outer, far = i_outside ? outer : inner;
  const int64_t near_rows = i_outside ? rows_j : rows_i, far_rows = i_outside ? rows_i : rows_j;
  const int64_t span = near_rows > 1 ? (near_rows - 1) * near + width : width;
  const bool apart = (near_rows <= 1 || near >= width) && (far_rows <= 1 || far >= span);
  GLMX_CHECK(apart, op, ": ", name, ": expected elements that do not overlap: got strides ", outer, " and ", inner, " over ", rows_i, " x ",
             rows_j, " rows of ", width);
}
}  // namespace

OpInfo head_gemm_info(DType operands) { return op_info("head_gemm", kHeadGemmRevision, kForward, operands); }

void head_gemm(const HeadGemmParams& p) {
  check_sizes("head_gemm", p.A, p.N, p.K);
  check_dtypes("head_gemm", p.dtype, p.out_dtype);
  check_apart("head_gemm", "y", p.T, p.y_token, p.A, p.y_head, p.N);
  select(kForward, p.dtype).fn(p);
}

void head_gemm_wgrad(const HeadGemmWgradParams& p) {
  const char* op = "head_gemm_wgrad";
  check_sizes(op, p.A, p.N, p.K);
  check_dtypes(op, p.dtype, p.out_dtype);
  GLMX_CHECK(!p.accumulate || p.out_dtype == DType::f32, op, ": expected an fp32 dw to accumulate into: got ", dtype_name(p.out_dtype));
  check_apart(op, "dw", p.A, p.dw_head, p.N, p.dw_row, p.K);
  select(kWgrad, p.dtype).fn(p);
}

}  // namespace glmx
