// What this card's memory and launches can do, as JSON lines: streaming read, gather of rows, and the time of an empty kernel in a graph.
//   nvcc -std=c++20 -O3 -arch=native ceilings.cu -o ceilings && ./ceilings
// The copy and the matrix product are torch's: ceilings.py. Data is never zero, and larger than any cache.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(x)                                                                                                \
  do {                                                                                                          \
    const cudaError_t error_ = (x);                                                                             \
    if (error_ != cudaSuccess) {                                                                                \
      std::printf("{\"name\":\"ceilings\",\"error\":\"%s, line %d\"}\n", cudaGetErrorString(error_), __LINE__); \
      std::exit(1);                                                                                             \
    }                                                                                                           \
  } while (0)

__device__ inline uint32_t mixed(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352d;
  x ^= x >> 15;
  x *= 0x846ca68b;
  return x ^ (x >> 16);
}

__device__ inline void fold(uint4& sum, uint4 v) {
  sum.x ^= v.x;
  sum.y ^= v.y;
  sum.z ^= v.z;
  sum.w ^= v.w;
}

// A store that never happens, which the compiler cannot know: the loads stay.
__device__ inline void keep(uint4 sum, uint4* out) {
  if ((sum.x | sum.y | sum.z | sum.w) == 0x12345) *out = sum;
}

__global__ void fill(uint4* p, size_t n) {
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) {
    const uint32_t v = mixed(static_cast<uint32_t>(i));
    p[i] = make_uint4(v, v * 3, v * 5, v * 7);
  }
}

__global__ void read_all(const uint4* __restrict__ p, size_t n, uint4* out) {
  uint4 sum{0, 0, 0, 0};
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + 3 * stride < n; i += 4 * stride) {  // four loads on their way before the first is used
    const uint4 a = p[i], b = p[i + stride], c = p[i + 2 * stride], d = p[i + 3 * stride];
    fold(sum, a);
    fold(sum, b);
    fold(sum, c);
    fold(sum, d);
  }
  keep(sum, out);
}

// Each warp reads whole rows of `pieces` times 16 bytes, picked at random among `rows`.
__global__ void gather(const uint4* __restrict__ p, uint32_t rows, int pieces, int rows_of_warp, uint4* out) {
  const uint32_t warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  uint4 sum{0, 0, 0, 0};
  for (int i = 0; i < rows_of_warp; i += 4) {
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const uint4* row = p + static_cast<size_t>(mixed(warp * 9781u + i + u) % rows) * pieces;
      for (int c = lane; c < pieces; c += 32) fold(sum, row[c]);
    }
  }
  keep(sum, out);
}

__global__ void empty() {}

template <class Run>
double median_ms(Run run) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 12; ++i) {
    CHECK(cudaEventRecord(begin));
    run();
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i > 1) times.push_back(ms);
  }
  CHECK(cudaGetLastError());
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

int main() {
  cudaDeviceProp card;
  CHECK(cudaGetDeviceProperties(&card, 0));
  std::printf("{\"name\":\"card\",\"card\":\"%s\",\"multiprocessors\":%d,\"l2_bytes\":%d,\"shared_bytes\":%zu}\n", card.name,
              card.multiProcessorCount, card.l2CacheSize, card.sharedMemPerBlockOptin);
  size_t bytes = size_t{8} << 30;
  uint4 *p = nullptr, *out = nullptr;
  while (bytes > (size_t{1} << 30) && cudaMalloc(&p, bytes) != cudaSuccess) bytes /= 2;
  cudaGetLastError();  // of the attempts that were too large
  CHECK(cudaMalloc(&out, sizeof(uint4)));
  fill<<<card.multiProcessorCount * 8, 512>>>(p, bytes / 16);
  CHECK(cudaDeviceSynchronize());

  const double read = median_ms([&] { read_all<<<card.multiProcessorCount * 8, 512>>>(p, bytes / 16, out); });
  std::printf("{\"name\":\"read\",\"unit\":\"TB/s\",\"rate\":%.3f,\"bytes\":%zu}\n", bytes / read / 1e9, bytes);
  for (int row_bytes : {1152, 8192, 12288}) {  // a token of an MLA cache; hidden rows of 4096 and 6144 bf16
    const int pieces = row_bytes / 16, blocks = card.multiProcessorCount * 4, each = row_bytes < 4096 ? 256 : 64;
    const uint32_t rows = static_cast<uint32_t>(bytes / row_bytes);
    const double ms = median_ms([&] { gather<<<blocks, 512>>>(p, rows, pieces, each, out); });
    std::printf("{\"name\":\"gather_%d\",\"unit\":\"TB/s\",\"rate\":%.3f}\n", row_bytes, 16.0 * blocks * each * row_bytes / ms / 1e9);
  }

  constexpr int kLaunches = 200;
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t ready;
  CHECK(cudaStreamCreate(&stream));
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < kLaunches; ++i) empty<<<1, 32, 0, stream>>>();
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&ready, graph, 0));
  const double in_graph = median_ms([&] { CHECK(cudaGraphLaunch(ready, nullptr)); });
  std::printf("{\"name\":\"launch_in_graph\",\"unit\":\"us\",\"rate\":%.3f}\n", in_graph * 1e3 / kLaunches);
  const double plain = median_ms([&] {
    for (int i = 0; i < kLaunches; ++i) empty<<<1, 32>>>();
  });
  std::printf("{\"name\":\"launch\",\"unit\":\"us\",\"rate\":%.3f}\n", plain * 1e3 / kLaunches);
  return 0;
}
