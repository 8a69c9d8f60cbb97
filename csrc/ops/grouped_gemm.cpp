// grouped_gemm, its gradients: checks and kernel choice.
#include "core/check.h"
#include "core/dispatch.h"
#include "cpu/kernels.h"
#include "gpu/kernels.h"
#include "ops/registry.h"

namespace glmx {
namespace {

using Forward = void(const GroupedGemmParams&);
using Dgrad = void(const GroupedGemmDgradParams&);
using Wgrad = void(const GroupedGemmWgradParams&);
using BiasGrad = void(const GroupedGemmBiasGradParams&);
constexpr Kernel<Forward> kForward[] = {{Isa::amx, cpu::amx::grouped_gemm},
                                        {Isa::avx512_bf16, cpu::avx512_bf16::grouped_gemm},
                                        {Isa::avx512, cpu::avx512::grouped_gemm},
                                        {Isa::avx2, cpu::avx2::grouped_gemm},
                                        {Isa::base, cpu::base::grouped_gemm}};
constexpr Kernel<Dgrad> kDgrad[] = {{Isa::amx, cpu::amx::grouped_gemm_dgrad},
                                    {Isa::avx512_bf16, cpu::avx512_bf16::grouped_gemm_dgrad},
                                    {Isa::avx512, cpu::avx512::grouped_gemm_dgrad},
                                    {Isa::avx2, cpu::avx2::grouped_gemm_dgrad},
                                    {Isa::base, cpu::base::grouped_gemm_dgrad}};
constexpr Kernel<Wgrad> kWgrad[] = {{Isa::amx, cpu::amx::grouped_gemm_wgrad},
                                    {Isa::avx512_bf16, cpu::avx512_bf16::grouped_gemm_wgrad},
                                    {Isa::avx512, cpu::avx512::grouped_gemm_wgrad},
                                    {Isa::avx2, cpu::avx2::grouped_gemm_wgrad},
                                    {Isa::base, cpu::base::grouped_gemm_wgrad}};
constexpr Kernel<BiasGrad> kBiasGrad[] = {{Isa::avx512, cpu::avx512::grouped_gemm_bias_grad},
                                          {Isa::avx2, cpu::avx2::grouped_gemm_bias_grad},
                                          {Isa::base, cpu::base::grouped_gemm_bias_grad}};

void check_sizes(const char* op, int64_t E, int64_t N, int64_t K) {
  GLMX_CHECK(E >= 1, op, ": expected at least one expert: got w.shape[0] == ", E);
  GLMX_CHECK(N >= 1 && K >= 1, op, ": expected N >= 1 and K >= 1: got N == ", N, ", K == ", K);
}

void check_dtypes(const char* op, DType dtype, DType out_dtype) {
  GLMX_CHECK(dtype == DType::bf16 || out_dtype == DType::f32, op, ": expected out_dtype fp32 with fp32 inputs: got ",
             dtype_name(out_dtype));
}

void check_offsets(const char* op, const int32_t* offsets, int64_t E, int64_t R) {
  GLMX_CHECK(offsets[0] == 0, op, ": expected expert_offsets[0] == 0: got ", offsets[0]);
  for (int64_t e = 0; e < E; ++e) {
    GLMX_CHECK(offsets[e] <= offsets[e + 1], op, ": expected ascending expert_offsets: got ", offsets[e], " then ", offsets[e + 1], " at ",
               e);
  }
  GLMX_CHECK(offsets[E] <= R, op, ": expected expert_offsets[-1] <= ", R, " rows: got ", offsets[E]);
}

void check_row_count(const char* op, const int32_t* row_token, int64_t R, int64_t M) {
  GLMX_CHECK(row_token != nullptr || R == M, op, ": expected as many rows as x has without row_token: got ", R, ", x has ", M);
}

// What expert_offsets and row_token hold, where the host can read it.
template <class Params>
void check_contents(const char* op, const Params& p) {
  if (!host_reads(p.device)) return;
  check_offsets(op, p.expert_offsets, p.E, p.R);
  for (int64_t r = 0; p.row_token != nullptr && r < p.expert_offsets[p.E]; ++r) {
    GLMX_CHECK(p.row_token[r] >= 0 && p.row_token[r] < p.M, op, ": expected row_token in [0, ", p.M, "): got ", p.row_token[r], " at row ",
               r);
  }
}

// Whose matrices hold what the table says is the caller's to see to.
void check_stored(const char* op, const GroupedGemmParams& p) {
  if (p.stored.table == nullptr) return;
  GLMX_CHECK(p.dtype == DType::bf16, op, ": x: expected dtype bf16 with stored weights: got ", dtype_name(p.dtype));
  GLMX_CHECK(p.stored.scale_dtype == DType::f32 || p.stored.scale_dtype == DType::bf16, op, ": expected scales of dtype fp32 or bf16: got ",
             dtype_name(p.stored.scale_dtype));
  GLMX_CHECK(p.preact == nullptr, op, ": expected no preact with stored weights, which have no gradient");
  const int64_t matrices = p.E * (p.silu_mul ? 2 : 1);
  for (int64_t i = 0; i < matrices; ++i) {
    GLMX_CHECK(p.stored.table[i] != 0, op, ": expected the address of matrix ", i, " of the stored weights: got 0");
    GLMX_CHECK(p.stored.format == StoredFormat::bf16 || p.stored.table[matrices + i] != 0, op,
               ": expected the address of the scales of matrix ", i, ": got 0");
  }
}

}  // namespace

OpInfo grouped_gemm_info(DType operands) { return op_info("grouped_gemm", kGroupedGemmRevision, kForward, operands); }

void grouped_gemm(const GroupedGemmParams& given) {
  const char* op = "grouped_gemm";
  GroupedGemmParams p = given;
  // Weights in few bits have no kernel on a GPU yet; a CPU that plays GPU takes the CPU's.
  if (p.stored.table != nullptr && p.device.backend == Backend::simt) p.device = Device{};
  GLMX_CHECK(p.stored.table == nullptr || !on_gpu(p.device), op, ": stored weights run on the CPU: got x on ",
             backend_name(p.device.backend));
  const int32_t dense[2] = {0, static_cast<int32_t>(p.R)};
  if (p.expert_offsets == nullptr) {
    GLMX_CHECK(p.E == 1, op, ": expected expert_offsets for ", p.E, " experts: got none");
    GLMX_CHECK(p.R < INT32_MAX, op, ": x: expected fewer than 2^31 - 1 rows: got ", p.R);
  }
  check_sizes(op, p.E, p.N, p.K);
  check_dtypes(op, p.dtype, p.out_dtype);
  GLMX_CHECK(!p.silu_mul || p.N % 2 == 0, op, ": expected an even w.shape[1] with silu_mul (gate rows, then up rows): got ", p.N);
  GLMX_CHECK(p.silu_mul || p.preact == nullptr, op, ": expected no preact without silu_mul");
  check_row_count(op, p.row_token, p.R, p.M);
  if (on_gpu(p.device)) {
    if (p.expert_offsets != nullptr) check_contents(op, p);
    return gpu::launch(op, &gpu::Kernels::grouped_gemm, p);
  }
  check_stored(op, p);
  if (p.expert_offsets == nullptr) p.expert_offsets = dense;
  check_contents(op, p);
  select(kForward, p.dtype).fn(p);
}

void grouped_gemm_dgrad(const GroupedGemmDgradParams& p) {
  const char* op = "grouped_gemm_dgrad";
  check_sizes(op, p.E, p.N, p.K);
  check_dtypes(op, p.dtype, p.out_dtype);
  if (host_reads(p.device)) check_offsets(op, p.expert_offsets, p.E, p.R);
  if (on_gpu(p.device)) return gpu::launch(op, &gpu::Kernels::grouped_gemm_dgrad, p);
  select(kDgrad, p.dtype).fn(p);
}

void grouped_gemm_wgrad(const GroupedGemmWgradParams& p) {
  const char* op = "grouped_gemm_wgrad";
  check_sizes(op, p.E, p.N, p.K);
  check_dtypes(op, p.dtype, p.out_dtype);
  GLMX_CHECK(!p.accumulate || p.out_dtype == DType::f32, op, ": expected an fp32 out to accumulate into: got ", dtype_name(p.out_dtype));
  check_row_count(op, p.row_token, p.R, p.M);
  check_contents(op, p);
  if (on_gpu(p.device)) return gpu::launch(op, &gpu::Kernels::grouped_gemm_wgrad, p);
  select(kWgrad, p.dtype).fn(p);
}

void grouped_gemm_bias_grad(const GroupedGemmBiasGradParams& p) {
  const char* op = "grouped_gemm_bias_grad";
  check_sizes(op, p.E, p.N, 1);
  if (host_reads(p.device)) check_offsets(op, p.expert_offsets, p.E, p.R);
  if (on_gpu(p.device)) return gpu::launch(op, &gpu::Kernels::grouped_gemm_bias_grad, p);
  select(kBiasGrad).fn(p);
}

}  // namespace glmx
