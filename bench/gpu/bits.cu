// Do mma.sync, wgmma, wgmma with swapped operands, and a narrower wgmma give the same bits for one fp32 dot product over K? JSON lines.
//   nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a bits.cu -o bits && ./bits
// One tile c[64, 64] = a[64, K] b[64, K]^T of bf16, K in steps of 16 in order, for K from 16 to 8192. Inputs of several kinds: bell-shaped;
// exponents spread over 2^-60 .. 2^60; products around the smallest normal number; denormals; and infinities and NaN among them. Every NaN
// counts as the same. Also says how often a plain chain of FMAs has the bits, and whether denormal inputs count as zero.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define CHECK(x)                                                                                            \
  do {                                                                                                      \
    const cudaError_t error_ = (x);                                                                         \
    if (error_ != cudaSuccess) {                                                                            \
      std::printf("{\"name\":\"bits\",\"error\":\"%s, line %d\"}\n", cudaGetErrorString(error_), __LINE__); \
      std::exit(1);                                                                                         \
    }                                                                                                       \
  } while (0)

namespace {

constexpr int kTile = 64;  // rows of a and of b, and k of one tile of shared memory

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// A K-major operand: rows of 128 bytes, 128-byte swizzle, 1024 bytes from one group of eight rows to the next.
__device__ inline uint64_t operand(const void* p, int byte) {
  const uint64_t address = (shared_address(p) + byte) >> 4 & 0x3fff;
  return address | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
__device__ inline void wgmma_n64(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, 1, 1, 1, 0, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]),
        "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]),
        "+f"(d[31])
      : "l"(a), "l"(b));
}
__device__ inline void wgmma_n8(float (&d)[4], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "l"(a), "l"(b));
}
#endif

enum Way { kWide, kSwapped, kNarrow };  // m64n64; m64n64 with a and b in each other's place; eight times m64n8

__global__ void __launch_bounds__(128, 1) by_wgmma(const uint16_t* a, const uint16_t* b, float* c, int K, Way way) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared[];
  char *const tile_a = shared, *const tile_b = shared + kTile * 128;
  float d[32] = {}, narrow[8][4] = {};
  for (int k0 = 0; k0 < K; k0 += kTile) {
    for (int i = static_cast<int>(threadIdx.x); i < kTile * kTile; i += 128) {
      const int row = i / kTile, k = i % kTile;
      uint32_t at = row * 128 + k * 2;
      at ^= at >> 3 & 0x70;
      const bool inside = k0 + k < K;
      *reinterpret_cast<uint16_t*>(tile_a + at) = inside ? a[row * K + k0 + k] : uint16_t{0};
      *reinterpret_cast<uint16_t*>(tile_b + at) = inside ? b[row * K + k0 + k] : uint16_t{0};
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int step = 0; step < 4 && k0 + step * 16 < K; ++step) {
      const uint64_t da = operand(tile_a, step * 32), db = operand(tile_b, step * 32);
      if (way == kNarrow) {
#pragma unroll
        for (int n = 0; n < 8; ++n) wgmma_n8(narrow[n], da, operand(tile_b + n * 1024, step * 32));
      } else {
        wgmma_n64(d, way == kSwapped ? db : da, way == kSwapped ? da : db);
      }
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    __syncthreads();
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = 0; i < 32; ++i) {
    const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    c[way == kSwapped ? column * kTile + row : row * kTile + column] = way == kNarrow ? narrow[i / 4][i % 4] : d[i];
  }
#endif
}

__global__ void __launch_bounds__(128, 1) by_mma(const uint16_t* a, const uint16_t* b, float* c, int K) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
  for (int j = 0; j < kTile / 8; ++j) {
    float d[4] = {};
    for (int k = 0; k < K; k += 16) {
      uint32_t ra[4], rb[2];
      for (int i = 0; i < 4; ++i)
        ra[i] = *reinterpret_cast<const uint32_t*>(a + (warp * 16 + group + i % 2 * 8) * K + k + i / 2 * 8 + pair * 2);
      for (int i = 0; i < 2; ++i) rb[i] = *reinterpret_cast<const uint32_t*>(b + (j * 8 + group) * K + k + i * 8 + pair * 2);
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                   : "r"(ra[0]), "r"(ra[1]), "r"(ra[2]), "r"(ra[3]), "r"(rb[0]), "r"(rb[1]));
    }
    for (int i = 0; i < 4; ++i) c[(warp * 16 + group + i / 2 * 8) * kTile + j * 8 + pair * 2 + i % 2] = d[i];
  }
}

float value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float f;
  std::memcpy(&f, &wide, 4);
  return f;
}

struct Draw {
  uint64_t state;
  uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
  }
  uint16_t bf16(double x) {
    const float f = static_cast<float>(x);
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  double normal() {
    double sum = 0;
    for (int i = 0; i < 12; ++i) sum += next() / 2147483648.0;
    return sum - 6;
  }
  uint16_t spread(int low, int high) {  // exponents uniform in [low, high]
    const int exponent = low + static_cast<int>(next() % static_cast<uint32_t>(high - low + 1));
    return bf16(std::ldexp(1 + next() % 128 / 128.0, exponent) * (next() % 2 ? 1 : -1));
  }
  uint16_t kind(int kind) {
    switch (kind) {
      case 0: return bf16(normal());
      case 1: return spread(-60, 60);
      case 2: return spread(-70, -58);                                           // products around 2^-126
      case 3: return static_cast<uint16_t>(next() % 0x80 | (next() % 2) << 15);  // denormals and zeros
      case 4: return next() % 3 ? spread(100, 126) : spread(-133, -100);         // denormals beside the largest
      default: return next() % 97 == 0 ? (next() % 2 ? 0x7f80 : 0xff80) : next() % 211 == 0 ? uint16_t{0x7fc1} : spread(-20, 20);
    }
  }
};

constexpr const char* kKinds[] = {"normal", "spread_60", "tiny_products", "denormal", "denormal_and_large", "inf_and_nan"};

bool same(float x, float y) { return (std::isnan(x) && std::isnan(y)) || std::memcmp(&x, &y, 4) == 0; }

}  // namespace

int main() {
  constexpr int kCells = kTile * kTile;
  for (int kind = 0; kind < 6; ++kind) {
    int cells = 0, wide = 0, swapped = 0, narrow = 0, chain = 0, finite = 0, nonzero = 0, as_zero = 0;
    double worst = 0;
    for (int K : {16, 32, 48, 64, 80, 128, 1408, 2048, 4096, 6144, 8192}) {
      Draw draw{static_cast<uint64_t>(kind * 100003 + K)};
      std::vector<uint16_t> a(kTile * K), b(kTile * K);
      for (auto& x : a) x = draw.kind(kind);
      // Denormals are multiplied by what makes them visible; where both are denormal, every product is zero.
      for (auto& x : b) x = kind == 3 ? draw.spread(100, 120) : draw.kind(kind);
      uint16_t *da, *db;
      float* dc;
      CHECK(cudaMalloc(&da, a.size() * 2));
      CHECK(cudaMalloc(&db, b.size() * 2));
      CHECK(cudaMalloc(&dc, kCells * 4));
      CHECK(cudaMemcpy(da, a.data(), a.size() * 2, cudaMemcpyHostToDevice));
      CHECK(cudaMemcpy(db, b.data(), b.size() * 2, cudaMemcpyHostToDevice));
      std::vector<float> c[4];
      for (int way = 0; way < 4; ++way) {
        c[way].resize(kCells);
        CHECK(cudaMemset(dc, 0xcd, kCells * 4));
        if (way == 3)
          by_mma<<<1, 128>>>(da, db, dc, K);
        else
          by_wgmma<<<1, 128, 2 * kTile * 128>>>(da, db, dc, K, static_cast<Way>(way));
        CHECK(cudaGetLastError());
        CHECK(cudaDeviceSynchronize());
        CHECK(cudaMemcpy(c[way].data(), dc, kCells * 4, cudaMemcpyDeviceToHost));
      }
      CHECK(cudaFree(da));
      CHECK(cudaFree(db));
      CHECK(cudaFree(dc));
      for (int i = 0; i < kCells; ++i) {
        const uint16_t *x = &a[i / kTile * K], *y = &b[i % kTile * K];
        double exact = 0, size = 0, flushed = 0;
        float sum = 0;
        for (int k = 0; k < K; ++k) {
          const double p = static_cast<double>(value(x[k])) * value(y[k]);
          const bool denormal = (x[k] & 0x7f80) == 0 || (y[k] & 0x7f80) == 0;
          exact += p;
          size += std::fabs(p);
          flushed += denormal ? 0 : p;
          sum = std::fma(value(x[k]), value(y[k]), sum);
        }
        const float got = c[3][i];
        ++cells;
        wide += same(got, c[kWide][i]);
        swapped += same(got, c[kSwapped][i]);
        narrow += same(got, c[kNarrow][i]);
        chain += same(got, sum);
        if (std::isfinite(got) && std::isfinite(exact) && size > 0) {
          ++finite;
          nonzero += got != 0;
          worst = std::fmax(worst, std::fabs(got - exact) / size);
          as_zero += exact != flushed && std::fabs(got - flushed) < std::fabs(got - exact);
        }
      }
    }
    std::printf(
        "{\"name\":\"bits_%s\",\"cells\":%d,\"wgmma_as_mma\":%d,\"swapped_as_mma\":%d,\"narrow_as_mma\":%d,\"as_fma_chain\":%d,"
        "\"finite\":%d,\"nonzero\":%d,\"denormals_as_zero\":%d,\"max_error_over_sum_abs\":%.3e,\"all_equal\":%s}\n",
        kKinds[kind], cells, wide, swapped, narrow, chain, finite, nonzero, as_zero, worst,
        wide == cells && swapped == cells && narrow == cells ? "true" : "false");
  }
  return 0;
}
