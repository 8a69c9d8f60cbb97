// The kernels among which grouped_gemm.cu chooses, one file each.
#pragma once
#include "glmx/ops.h"

namespace glmx::gpu {

// grouped_gemm_f32.cu: fp32 operands, the GEMM tree of ops.h in FMA: the bits of the CPU.
void forward_f32(const GroupedGemmParams& p);
void dgrad_f32(const GroupedGemmDgradParams& p);
void wgrad_f32(const GroupedGemmWgradParams& p);

// sm90/grouped_gemm.cu: bf16 on Hopper (TMA, mbarrier, wgmma).
bool sm90_takes(const GroupedGemmParams& p);
void sm90_forward(const GroupedGemmParams& p);

}  // namespace glmx::gpu
