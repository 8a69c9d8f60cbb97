// What this CPU can do (CPUID, XGETBV, AMX permission) and what GLMX_ISA allows. Read once per process.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace glmx {

// An ISA level: each contains the ones before it.
enum class Isa : int32_t { base = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

constexpr Isa kIsas[] = {Isa::base, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx};

const char* isa_name(Isa isa);

// avx2: AVX2 + FMA. avx512: F, BW, DQ, VL on top. avx512_bf16: BF16 and VBMI on top, found to add in two fused steps. amx: AMX-TILE +
// AMX-BF16 on top, with the kernel's permission for tile data.
Isa machine_isa();

// The level in force: machine_isa(), lowered by GLMX_ISA. A pin that the machine lacks, or an unknown name, throws glmx::Error.
Isa active_isa();

// Every level this machine can run, base first.
std::vector<Isa> supported_isas();

std::string cpu_model();

}  // namespace glmx
