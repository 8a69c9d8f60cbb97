// The ceilings of this machine, for bench/roofline.py: what its FMA units, its tiles and its memory reach with nothing in the way.
//   fma    fp32 FMA on registers alone                      tree   the GEMM tree's kernel (4 rows x 2 vectors) fed from L1
//   tile   AMX bf16 products on tiles alone                 tile_l1  a 2 x 2 block of tiles, its operands loaded from L1
//   read   reading memory, 256 MiB a thread
// usage: roofline THREADS SECONDS   prints one JSON object: name -> GFLOP/s, or GB/s for read. All threads run at once; the best of
// several windows counts, since a neighbour can only slow a window down.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <barrier>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

#include "cpu/amx/tile.h"

using Clock = std::chrono::steady_clock;
std::atomic<float> g_sink{0};

// Each returns the flop (or bytes) of one call, which takes some tens of microseconds.
__attribute__((target("avx512f"))) double fma_avx512(void*) {
  constexpr int kRounds = 20000;
  __m512 acc[12];
  for (int i = 0; i < 12; ++i) acc[i] = _mm512_set1_ps(1.0f + static_cast<float>(i));
  const __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(0.001f);
  for (int r = 0; r < kRounds; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) acc[i] = _mm512_fmadd_ps(acc[i], a, b);
  }
  for (int i = 1; i < 12; ++i) acc[0] = _mm512_add_ps(acc[0], acc[i]);
  g_sink = _mm512_reduce_add_ps(acc[0]);
  return 2.0 * 16 * 12 * kRounds;
}

__attribute__((target("avx2,fma"))) double fma_avx2(void*) {
  constexpr int kRounds = 20000;
  __m256 acc[12];
  for (int i = 0; i < 12; ++i) acc[i] = _mm256_set1_ps(1.0f + static_cast<float>(i));
  const __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(0.001f);
  for (int r = 0; r < kRounds; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) acc[i] = _mm256_fmadd_ps(acc[i], a, b);
  }
  for (int i = 1; i < 12; ++i) acc[0] = _mm256_add_ps(acc[0], acc[i]);
  g_sink = _mm256_cvtss_f32(acc[0]);
  return 2.0 * 8 * 12 * kRounds;
}

// One 4 x 32 result over 128 of depth: a [128][4], b [128][32] in L1 (18 KB), the even and the odd chain of each 32 apart.
constexpr int kDepth = 128;
__attribute__((target("avx512f"))) double tree_avx512(void* memory) {
  constexpr int kCalls = 400;
  const float *a = static_cast<float*>(memory), *b = a + kDepth * 4;
  __m512 c[4][2] = {};
  for (int call = 0; call < kCalls; ++call) {
    for (int k0 = 0; k0 < kDepth; k0 += 32) {
      __m512 chain[2][4][2] = {};
      for (int k = k0; k < k0 + 32; k += 2) {
#pragma GCC unroll 2
        for (int parity = 0; parity < 2; ++parity) {
          const __m512 b0 = _mm512_loadu_ps(b + (k + parity) * 32), b1 = _mm512_loadu_ps(b + (k + parity) * 32 + 16);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            const __m512 row = _mm512_set1_ps(a[(k + parity) * 4 + i]);
            chain[parity][i][0] = _mm512_fmadd_ps(row, b0, chain[parity][i][0]);
            chain[parity][i][1] = _mm512_fmadd_ps(row, b1, chain[parity][i][1]);
          }
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        c[i][0] = _mm512_add_ps(c[i][0], _mm512_add_ps(chain[0][i][0], chain[1][i][0]));
        c[i][1] = _mm512_add_ps(c[i][1], _mm512_add_ps(chain[0][i][1], chain[1][i][1]));
      }
    }
  }
  for (int i = 0; i < 4; ++i) g_sink = _mm512_reduce_add_ps(_mm512_add_ps(c[i][0], c[i][1]));
  return 2.0 * 4 * 32 * kDepth * kCalls;
}

// The same on words of two bf16 (csrc/cpu/avx512_bf16/pairs.h): a [64][4], b [64][32].
__attribute__((target("avx512f,avx512bf16"))) double tree_avx512_bf16(void* memory) {
  constexpr int kCalls = 400;
  const int32_t *a = static_cast<int32_t*>(memory), *b = a + kDepth / 2 * 4;
  __m512 c[4][2] = {};
  for (int call = 0; call < kCalls; ++call) {
    for (int w0 = 0; w0 < kDepth / 2; w0 += 16) {
      __m512 chain[2][4][2] = {};
      for (int w = w0; w < w0 + 16; w += 2) {
#pragma GCC unroll 2
        for (int parity = 0; parity < 2; ++parity) {
          const __m512bh b0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + (w + parity) * 32));
          const __m512bh b1 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + (w + parity) * 32 + 16));
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            const __m512bh row = reinterpret_cast<__m512bh>(_mm512_set1_epi32(a[(w + parity) * 4 + i]));
            chain[parity][i][0] = _mm512_dpbf16_ps(chain[parity][i][0], row, b0);
            chain[parity][i][1] = _mm512_dpbf16_ps(chain[parity][i][1], row, b1);
          }
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        c[i][0] = _mm512_add_ps(c[i][0], _mm512_add_ps(chain[0][i][0], chain[1][i][0]));
        c[i][1] = _mm512_add_ps(c[i][1], _mm512_add_ps(chain[0][i][1], chain[1][i][1]));
      }
    }
  }
  for (int i = 0; i < 4; ++i) g_sink = _mm512_reduce_add_ps(_mm512_add_ps(c[i][0], c[i][1]));
  return 2.0 * 4 * 32 * kDepth * kCalls;
}

// The same in fp32 for sixteen registers: 3 x 16.
__attribute__((target("avx2,fma"))) double tree_avx2(void* memory) {
  constexpr int kCalls = 400;
  const float *a = static_cast<float*>(memory), *b = a + kDepth * 4;
  alignas(32) float c[3][16] = {};
  for (int call = 0; call < kCalls; ++call) {
    for (int k0 = 0; k0 < kDepth; k0 += 32) {
      __m256 chain[2][3][2] = {};
      for (int k = k0; k < k0 + 32; k += 2) {
#pragma GCC unroll 2
        for (int parity = 0; parity < 2; ++parity) {
          const __m256 b0 = _mm256_loadu_ps(b + (k + parity) * 16), b1 = _mm256_loadu_ps(b + (k + parity) * 16 + 8);
#pragma GCC unroll 3
          for (int i = 0; i < 3; ++i) {
            const __m256 row = _mm256_set1_ps(a[(k + parity) * 3 + i]);
            chain[parity][i][0] = _mm256_fmadd_ps(row, b0, chain[parity][i][0]);
            chain[parity][i][1] = _mm256_fmadd_ps(row, b1, chain[parity][i][1]);
          }
        }
      }
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          float* at = c[i] + 8 * j;
          _mm256_store_ps(at, _mm256_add_ps(_mm256_load_ps(at), _mm256_add_ps(chain[0][i][j], chain[1][i][j])));
        }
      }
    }
  }
  float sum = 0;  // of every result: the compiler drops the work behind one that nobody reads
  for (const auto& row : c) {
    for (const float value : row) sum += value;
  }
  g_sink = sum;
  return 2.0 * 3 * 16 * kDepth * kCalls;
}

double tile_resident(void*) {
  constexpr int kRounds = 2000;
  TileConfig config;
  for (int t = 0; t < 8; ++t) config.rows[t] = 16, config.row_bytes[t] = 64;
  tile_configure(config);
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>(), tile_zero<4>(), tile_zero<5>(), tile_zero<6>(), tile_zero<7>();
  for (int r = 0; r < kRounds; ++r) tile_dot<0, 4, 6>(), tile_dot<1, 4, 7>(), tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
  tile_release();
  return 2.0 * 16 * 16 * 32 * 4 * kRounds;
}

double tile_from_l1(void* memory) {
  constexpr int kRounds = 2000;
  char* p = static_cast<char*>(memory);
  TileConfig config;
  for (int t = 0; t < 8; ++t) config.rows[t] = 16, config.row_bytes[t] = 64;
  tile_configure(config);
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (int r = 0; r < kRounds; ++r) {
    char* block = p + (r % 4) * 4096;
    tile_load<4>(block, 64), tile_load<5>(block + 1024, 64), tile_load<6>(block + 2048, 64), tile_load<7>(block + 3072, 64);
    tile_dot<0, 4, 6>(), tile_dot<1, 4, 7>(), tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
  }
  tile_release();
  return 2.0 * 16 * 16 * 32 * 4 * kRounds;
}

constexpr size_t kReadBytes = size_t{256} << 20, kSlice = size_t{8} << 20;
__attribute__((target("avx2"))) double read_slice(void* memory) {
  thread_local size_t at = 0;
  const char* p = static_cast<char*>(memory) + at;
  at = (at + kSlice) % kReadBytes;
  __m256i sum[4] = {};
  for (size_t i = 0; i < kSlice; i += 128) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[j] = _mm256_add_epi64(sum[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i + 32 * j)));
  }
  const __m256i all = _mm256_add_epi64(_mm256_add_epi64(sum[0], sum[1]), _mm256_add_epi64(sum[2], sum[3]));
  g_sink = static_cast<float>(_mm256_extract_epi64(all, 0));
  return kSlice;
}

// The best window of `threads` threads at once, in units of 1e9 a second.
double best_rate(double (*kernel)(void*), size_t bytes, int threads, double seconds) {
  constexpr int kWindows = 5;
  std::vector<double> done(static_cast<size_t>(kWindows) * threads);
  std::vector<std::thread> pool;
  Clock::time_point start;
  std::barrier ready(threads, [&start]() noexcept { start = Clock::now(); });  // when every thread has its memory
  const auto window = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds / kWindows));
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([=, &done, &start, &ready] {
      void* memory = std::aligned_alloc(4096, bytes);
      std::memset(memory, 0, bytes);
      kernel(memory);
      ready.arrive_and_wait();
      for (int w = 0; w < kWindows; ++w) {
        const auto end = start + window * (w + 1);
        const auto begun = Clock::now();
        double work = 0;
        while (Clock::now() < end) work += kernel(memory);
        done[static_cast<size_t>(w * threads + t)] = work / std::chrono::duration<double>(Clock::now() - begun).count();
      }
      std::free(memory);
    });
  }
  for (auto& thread : pool) thread.join();
  double best = 0;
  for (int w = 0; w < kWindows; ++w) {
    double sum = 0;
    for (int t = 0; t < threads; ++t) sum += done[static_cast<size_t>(w * threads + t)];
    best = sum > best ? sum : best;
  }
  return best / 1e9;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  const double seconds = argc > 2 ? std::atof(argv[2]) : 0.5;
  if (threads < 1 || threads > 1024 || seconds <= 0) {
    std::fprintf(stderr, "usage: roofline THREADS SECONDS\n");
    return 2;
  }
  __builtin_cpu_init();
  std::printf("{\"read\": %.2f", best_rate(read_slice, kReadBytes, threads, seconds));
  constexpr size_t kSmall = 64 << 10;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    std::printf(", \"fma_avx2\": %.1f", best_rate(fma_avx2, kSmall, threads, seconds));
    std::printf(", \"tree_avx2\": %.1f", best_rate(tree_avx2, kSmall, threads, seconds));
  }
  if (__builtin_cpu_supports("avx512f")) {
    std::printf(", \"fma_avx512\": %.1f", best_rate(fma_avx512, kSmall, threads, seconds));
    std::printf(", \"tree_avx512\": %.1f", best_rate(tree_avx512, kSmall, threads, seconds));
  }
  if (__builtin_cpu_supports("avx512bf16")) {
    std::printf(", \"tree_avx512_bf16\": %.1f", best_rate(tree_avx512_bf16, kSmall, threads, seconds));
  }
  constexpr long kArchReqXcompPerm = 0x1023, kTileData = 18;
  unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  if ((edx >> 22 & 1) && (edx >> 24 & 1) && syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) == 0) {
    std::printf(", \"tile\": %.1f", best_rate(tile_resident, kSmall, threads, seconds));
    std::printf(", \"tile_l1\": %.1f", best_rate(tile_from_l1, kSmall, threads, seconds));
  }
  std::printf("}\n");
}
