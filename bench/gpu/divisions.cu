// Whether gx::reciprocal and gx::quotient, which have no branch, are divisions on this card, for the numbers that csrc/gpu/gx/cuda.h names:
// every d in [1, 2^127), and 2^34 pairs of |x| in [2^-60, 2^60], d in [1, 2^100), |x / d| from 2^-121 on. One JSON line each; tests/gpu
// reads them. nvcc with the flags of the product (cmake/GlmxCuda.cmake).
#include <cstdio>

#include "gpu/gx/gx.h"

namespace {

__device__ uint32_t mix(uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdull;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ull;
  return static_cast<uint32_t>(x >> 32);
}

__global__ void reciprocals(unsigned long long* differing, uint32_t first, uint32_t count) {
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    const float d = gx::from_bits(first + i);
    if (gx::to_bits(gx::reciprocal(d)) != gx::to_bits(1.0f / d)) atomicAdd(differing, 1ull);
  }
}

__global__ void quotients(unsigned long long* differing, uint64_t count) {
  for (uint64_t i = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x; i < count; i += gridDim.x * uint64_t{blockDim.x}) {
    const uint32_t a = mix(2 * i + 1), b = mix(2 * i + 2);
    // A mantissa and a sign as they come; exponents -60..59 and 0..99, the second at most 120 above the first: no quotient is denormal.
    const int of_x = static_cast<int>(a >> 23 & 0xff) % 120 - 60, any = static_cast<int>(b >> 23 & 0xff) % 100;
    const int of_d = any < of_x + 120 ? any : of_x + 120;
    const float x = gx::from_bits((a & 0x807fffffu) | (static_cast<uint32_t>(127 + of_x) << 23));
    const float d = gx::from_bits((b & 0x7fffffu) | (static_cast<uint32_t>(127 + of_d) << 23));
    if (gx::to_bits(gx::quotient(x, d)) != gx::to_bits(x / d)) atomicAdd(differing, 1ull);
  }
}

void report(const char* name, unsigned long long* differing, unsigned long long count) {
  unsigned long long bad = ~0ull;
  const cudaError_t error = cudaMemcpy(&bad, differing, sizeof(bad), cudaMemcpyDeviceToHost);
  if (error != cudaSuccess) {
    std::printf("{\"name\": \"%s\", \"error\": \"%s\"}\n", name, cudaGetErrorString(error));
  } else {
    std::printf("{\"name\": \"%s\", \"numbers\": %llu, \"differing\": %llu, \"all_equal\": %s}\n", name, count, bad,
                bad == 0 ? "true" : "false");
  }
  cudaMemset(differing, 0, sizeof(bad));
}

}  // namespace

int main() {
  unsigned long long* differing = nullptr;
  if (cudaMalloc(&differing, sizeof(*differing)) != cudaSuccess) return 1;
  cudaMemset(differing, 0, sizeof(*differing));
  const uint32_t first = 127u << 23, count = 127u << 23;  // the bits of 1 to those before 2^127
  reciprocals<<<1024, 256>>>(differing, first, count);
  report("reciprocal", differing, count);
  quotients<<<1024, 256>>>(differing, uint64_t{1} << 34);
  report("quotient", differing, uint64_t{1} << 34);
  return 0;
}
