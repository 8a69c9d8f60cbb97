// Bits of a ballot.
#pragma once
#include "gpu/gx/gx.h"

namespace glmx::gpu {

__device__ inline int count_bits(uint32_t mask) { return __builtin_popcount(mask); }
// The index of the lowest bit that is set; 32 when none is.
__device__ inline int lowest_bit(uint32_t mask) { return count_bits((mask & (0u - mask)) - 1u); }
// The bits below `lane`.
__device__ inline uint32_t bits_below(int lane) { return (1u << lane) - 1u; }

}  // namespace glmx::gpu
