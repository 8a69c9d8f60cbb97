// The Hopper half of gx on the CPU that plays GPU: a pipeline of TMA, mbarriers and wgmma against plain loops, and each fault of it.
#include "kernels_for_tests.h"

using namespace simt_test;

namespace {

constexpr int kStages = 3, kRows = 64, kDepth = 64;

// What is broken on purpose.
enum Fault {
  kNone,
  kNoFullWait,     // the consumers do not wait for the bytes
  kEarlyFree,      // a stage is given back before its products are done
  kMoreBytes,      // the barrier expects 16 bytes more than come
  kFewerBytes,     // and 16 fewer
  kMisaligned,     // TMA to an address that is not a multiple of 1024
  kNoProductWait,  // sums are read in flight
  kNoFence,        // no wgmma_fence
  kNoInitFence,    // no mbarrier_init_done
  kNoInit,         // no mbarrier_init of the second stage
  kTwoArrivals,    // a thread arrives twice
  kWrongStage,     // the consumers read the stage beside theirs
  kNoEmptyWait,    // the producer does not wait until a stage is free
  kLostCopy,       // a bulk copy that nobody waits for
  kDiverged,       // one thread multiplies once more
};

template <int kColumns>
__global__ void __launch_bounds__(256) pipeline(const __grid_constant__ gx::TensorMap map_a, const __grid_constant__ gx::TensorMap map_b,
                                                float* out, int64_t ld, int steps, bool swapped, Fault fault) {
  GX_DYNAMIC_SHARED(unsigned char, stages);
  __shared__ uint64_t full[kStages], empty[kStages];
  constexpr int kBytesA = kRows * 128, kBytesB = kColumns * 128, kStageBytes = (kBytesA + kBytesB + 1023) / 1024 * 1024;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      if (fault == kNoInit && s == 1) continue;
      gx::mbarrier_init(&full[s], 1);
      gx::mbarrier_init(&empty[s], 128);
    }
    if (fault != kNoInitFence) gx::mbarrier_init_done();
  }
  gx::barrier();
  if (threadIdx.x / 128 == 0) {
    gx::registers_down<24>();
    if (threadIdx.x != 0) return;
    for (int k = 0; k < steps; ++k) {
      const int s = k % kStages;
      if (k >= kStages && fault != kNoEmptyWait) gx::mbarrier_wait(&empty[s], (k / kStages - 1) % 2);
      const int wrong = fault == kMoreBytes ? 16 : fault == kFewerBytes ? -16 : 0;
      gx::mbarrier_expect(&full[s], kBytesA + kBytesB + (k == 2 ? wrong : 0));
      if (fault == kTwoArrivals) gx::mbarrier_arrive(&full[s]);
      unsigned char* const a = stages + s * kStageBytes + (fault == kMisaligned ? 512 : 0);
      gx::tma_load(a, &map_a, &full[s], k * kDepth, static_cast<int>(blockIdx.y) * kRows);
      gx::tma_load(stages + s * kStageBytes + kBytesA, &map_b, &full[s], k * kDepth, static_cast<int>(blockIdx.x) * kColumns);
    }
    if (fault == kLostCopy) gx::tma_load(stages + steps * kStageBytes, &map_a, &full[steps], 0, 0);
    return;
  }
  gx::registers_up<240>();
  float c[kColumns / 2];
  for (int k = 0; k < steps; ++k) {
    const int s = k % kStages;
    if (fault != kNoFullWait) gx::mbarrier_wait(&full[s], k / kStages % 2);
    const unsigned char* const a = stages + (fault == kWrongStage ? (s + 1) % kStages : s) * kStageBytes;
    if (fault != kNoFence) gx::wgmma_fence();
    for (int i = 0; i < kDepth; i += 16) {
      if (swapped) {
        if constexpr (kColumns == kRows) gx::wgmma<kColumns>(c, gx::operand(a + kBytesA + i * 2), gx::operand(a + i * 2), k + i > 0);
      } else {
        gx::wgmma<kColumns>(c, gx::operand(a + i * 2), gx::operand(a + kBytesA + i * 2), k + i > 0);
      }
    }
    if (fault == kDiverged && threadIdx.x == 130) gx::wgmma<kColumns>(c, gx::operand(a), gx::operand(a + kBytesA), true);
    gx::wgmma_commit();
    if (fault == kEarlyFree) gx::mbarrier_arrive(&empty[s]);
    if (fault != kNoProductWait) gx::wgmma_wait<0>();
    if (fault != kEarlyFree) gx::mbarrier_arrive(&empty[s]);
  }
  for (int i = 0; i < kColumns / 2; ++i) {
    const int row = gx::wgmma_row(i), column = gx::wgmma_col(i);
    const int64_t m = blockIdx.y * kRows + (swapped ? column : row), n = blockIdx.x * kColumns + (swapped ? row : column);
    out[m * ld + n] = c[i];
  }
}

struct Matrices {
  int m, n, k;
  std::vector<uint16_t> a, b;
  Matrices(int m_, int n_, int k_) : m(m_), n(n_), k(k_), a(random_bf16(m * k, 1)), b(random_bf16(n * k, 2)) {}
};

template <int kColumns>
std::vector<float> run(const Matrices& x, bool swapped = false, Fault fault = kNone, int columns = -1) {
  std::vector<float> out(static_cast<size_t>(x.m * x.n), -1.0f);
  if (columns < 0) columns = x.k;
  const gx::TensorMap a = gx::tensor_map("pipeline", x.a.data(), x.m, columns, x.k, kRows, 64);
  const gx::TensorMap b = gx::tensor_map("pipeline", x.b.data(), x.n, columns, x.k, kColumns, 64);
  constexpr size_t kStageBytes = (kRows * 128 + kColumns * 128 + 1023) / 1024 * 1024;
  gx::launch("pipeline", pipeline<kColumns>, dim3(static_cast<unsigned>(x.n / kColumns), static_cast<unsigned>(x.m / kRows)), 256,
             kStages * kStageBytes, {}, a, b, out.data(), int64_t{x.n}, x.k / kDepth, swapped, fault);
  return out;
}

template <int kColumns>
void compare(const Matrices& x) {
  const std::vector<float> got = run<kColumns>(x);
  for (int i = 0; i < x.m; ++i) {
    for (int j = 0; j < x.n; ++j) {
      double want = 0, size = 0;
      for (int k = 0; k < x.k; ++k) {
        const double product =
            double{gx::load(&x.a[static_cast<size_t>(i * x.k + k)])} * double{gx::load(&x.b[static_cast<size_t>(j * x.k + k)])};
        want += product;
        size += std::fabs(product);
      }
      const double error = std::fabs(got[static_cast<size_t>(i * x.n + j)] - want);
      CHECK(error <= size * x.k * 0x1p-24, "row ", i, " column ", j, ": got ", got[static_cast<size_t>(i * x.n + j)], ", want ", want);
    }
  }
}

// message: what the error must say. None: an error or wrong sums, depending on who runs first.
void faulty(Fault fault, const std::string& message, int m = 64, int n = 64, int k = 512) {
  const Matrices x(m, n, k);
  const std::vector<float> right = run<64>(x);
  in_every_order([&](const char* order) {
    std::vector<float> got;
    const std::string error = error_of([&] { got = run<64>(x, false, fault); });
    if (message.empty() && error.empty()) {
      CHECK(!same_bits(got, right), "in order ", order, ": not noticed");
    } else {
      CHECK(error.find("pipeline: block (0, 0): ") == 0, "in order ", order, ": ", error);
      CHECK(error.find(message) != std::string::npos, "in order ", order, ": ", error);
    }
  });
}

}  // namespace

TEST(simt_hopper, pipeline_matches_loops) {
  in_every_order([](const char*) {
    compare<8>(Matrices(64, 16, 256));
    compare<16>(Matrices(64, 16, 512));
    compare<64>(Matrices(128, 128, 640));
    compare<128>(Matrices(64, 128, 128));
    compare<256>(Matrices(64, 256, 256));
  });
}

TEST(simt_hopper, same_bits_in_every_order) {
  const Matrices x(128, 128, 512);
  const std::vector<float> first = run<64>(x);
  in_every_order([&](const char* order) { CHECK(same_bits(run<64>(x), first), order); });
}

TEST(simt_hopper, swapped_operands_give_the_same_bits) {
  const Matrices x(128, 128, 512);
  CHECK(same_bits(run<64>(x), run<64>(x, true)));
}

// The 16 x 16 corner of the product by the other family: a kernel that took mma for some rows and wgmma for others would fail X3 here.
__global__ void corner_by_mma(const uint16_t* a, const uint16_t* b, float* out, int depth) {
  __shared__ gx::Vec16 tiles[2][2][32];  // a block has two teams: both do the same
  gx::Vec16 *tile_a = tiles[gx::team()][0], *tile_b = tiles[gx::team()][1];
  const int row = gx::lane() / 2, half = gx::lane() % 2;
  gx::FragC sums[2] = {};
  for (int k = 0; k < depth; k += 16) {
    gx::store16(&tile_a[gx::lane()], gx::load16(a + row * depth + k + half * 8));
    gx::store16(&tile_b[gx::lane()], gx::load16(b + row * depth + k + half * 8));
    gx::team_barrier();
    gx::FragA fa;
    gx::FragB fb[2];
    gx::load_a(fa, &tile_a[gx::load_a_m() * 2 + gx::load_a_k() / 8]);
    gx::load_b_pair(fb, &tile_b[gx::load_b_n() * 2 + gx::load_b_k() / 8]);
    for (int j = 0; j < 2; ++j) gx::mma(sums[j], fa, fb[j]);
    gx::team_barrier();
  }
  for (int j = 0; j < 2; ++j) {
    for (int v = 0; v < 4; ++v) out[sums[j].row(v) * 16 + 8 * j + sums[j].col(v)] = sums[j].v[v];
  }
}

TEST(simt_hopper, families_add_in_orders_of_their_own) {
  const Matrices x(64, 64, 512);
  const Aligned<uint16_t> a(x.a), b(x.b);
  const std::vector<float> wgmma = run<64>(x);
  std::vector<float> mma(16 * 16);
  gx::launch("corner_by_mma", corner_by_mma, dim3(1), 64, 0, {}, a.data(), b.data(), mma.data(), x.k);
  int differing = 0;
  for (int i = 0; i < 256; ++i) {
    const float other = wgmma[static_cast<size_t>(i / 16 * 64 + i % 16)];
    CHECK(std::fabs(mma[static_cast<size_t>(i)] - other) < 1e-3f, "cell ", i, ": ", mma[static_cast<size_t>(i)], " and ", other);
    differing += mma[static_cast<size_t>(i)] != other;
  }
  CHECK(differing > 0, "both families gave the same bits");
}

TEST(simt_hopper, outside_of_a_tensor_map_reads_as_zero) {
  Matrices x(64, 64, 128), cut(64, 64, 128);
  for (int i = 0; i < 64; ++i) {
    for (int k = 88; k < 128; ++k) cut.a[static_cast<size_t>(i * 128 + k)] = cut.b[static_cast<size_t>(i * 128 + k)] = 0;
  }
  CHECK(same_bits(run<64>(x, false, kNone, 88), run<64>(cut)));
}

TEST(simt_hopper, reading_before_the_bytes_are_there) { faulty(kNoFullWait, ""); }
TEST(simt_hopper, stage_freed_before_its_products) { faulty(kEarlyFree, ""); }
TEST(simt_hopper, producer_that_does_not_wait) { faulty(kNoEmptyWait, ""); }
TEST(simt_hopper, wrong_stage) { faulty(kWrongStage, ""); }
TEST(simt_hopper, more_bytes_expected_than_come) { faulty(kMoreBytes, "lacks 0 arrivals and 16 bytes"); }
TEST(simt_hopper, fewer_bytes_expected_than_come) { faulty(kFewerBytes, "received 16 bytes more than this phase expects"); }
TEST(simt_hopper, misaligned_tma) { faulty(kMisaligned, "is not aligned to 1024 bytes"); }
TEST(simt_hopper, products_not_waited_for) { faulty(kNoProductWait, "products of wgmma that it has not waited for"); }
TEST(simt_hopper, no_wgmma_fence) { faulty(kNoFence, "no wgmma_fence()"); }
TEST(simt_hopper, no_fence_after_init) { faulty(kNoInitFence, "has not called mbarrier_init_done()"); }
TEST(simt_hopper, mbarrier_not_initialised) { faulty(kNoInit, "nobody has initialised the mbarrier"); }
TEST(simt_hopper, one_arrival_too_many) { faulty(kTwoArrivals, "expects no more arrivals"); }
TEST(simt_hopper, bulk_copy_that_nobody_waits_for) { faulty(kLostCopy, "it ends w", 64, 64, 128); }
TEST(simt_hopper, different_products_in_a_warpgroup) { faulty(kDiverged, "issued different products"); }

// ---- The proxy fence and descriptors --------------------------------------------------------------------------------------------------

namespace {

enum Writing { kByStore16, kByCopy, kByStore16NoFence, kByCopyNoFence, kFenceBeforeCopies, kOperandOfRow1, kOperandOutside, kSumsTouched };

// Threads write two tiles themselves and multiply them.
__global__ void written_tiles(const uint16_t* a, const uint16_t* b, float* out, Writing writing) {
  GX_DYNAMIC_SHARED(unsigned char, tiles);
  __shared__ uint64_t unused;
  if (threadIdx.x == 0) gx::mbarrier_init(&unused, 1);
  gx::barrier();
  for (int i = static_cast<int>(threadIdx.x); i < 1024; i += 128) {
    const int tile = i / 512, at = i % 512 * 16;
    const uint16_t* from = (tile == 0 ? a : b) + i % 512 * 8;
    unsigned char* to = tiles + tile * 8192 + (at ^ ((at >> 3) & 0x70));
    if (writing == kByCopy || writing == kByCopyNoFence || writing == kFenceBeforeCopies) {
      gx::copy_async16(to, from, true);
    } else {
      gx::store16(to, gx::load16(from));
    }
  }
  gx::commit();
  if (writing == kFenceBeforeCopies) gx::fence_async();
  gx::wait<0>();
  if (writing != kByStore16NoFence && writing != kByCopyNoFence && writing != kFenceBeforeCopies) gx::fence_async();
  gx::barrier();
  float c[32] = {};
  gx::wgmma_fence();
  for (int k = 0; k < 64; k += 16) {
    const unsigned char* first = tiles + k * 2 + (writing == kOperandOfRow1 ? 128 : writing == kOperandOutside ? 9216 : 0);
    gx::wgmma<64>(c, gx::operand(first), gx::operand(tiles + 8192 + k * 2), true);
  }
  if (writing == kSumsTouched) c[5] = 0.0f;
  gx::wgmma_commit();
  gx::wgmma_wait<0>();
  for (int i = 0; i < 32; ++i) out[gx::wgmma_row(i) * 64 + gx::wgmma_col(i)] = c[i];
}

std::string write_and_multiply(Writing writing, std::vector<float>* out = nullptr) {
  const Matrices x(64, 64, 64);
  const Aligned<uint16_t> a(x.a), b(x.b);
  std::vector<float> sums(64 * 64);
  const std::string error =
      error_of([&] { gx::launch("written_tiles", written_tiles, dim3(1), 128, 16384, {}, a.data(), b.data(), sums.data(), writing); });
  if (out != nullptr) *out = sums;
  return error;
}

}  // namespace

TEST(simt_hopper, tiles_that_threads_write) {
  const std::vector<float> want = run<64>(Matrices(64, 64, 64));
  in_every_order([&](const char* order) {
    for (const Writing writing : {kByStore16, kByCopy}) {
      std::vector<float> got;
      CHECK(write_and_multiply(writing, &got).empty(), order);
      CHECK(same_bits(got, want), order);
    }
    for (const Writing writing : {kByStore16NoFence, kByCopyNoFence, kFenceBeforeCopies}) {
      CHECK(write_and_multiply(writing).find("no fence_async() has followed") != std::string::npos, order);
    }
  });
}

TEST(simt_hopper, wrong_descriptors) {
  CHECK(write_and_multiply(kOperandOfRow1).find("does not begin in the first of eight rows") != std::string::npos);
  CHECK(write_and_multiply(kOperandOutside).find("lies outside dynamic shared memory") != std::string::npos);
}

TEST(simt_hopper, sums_touched_in_flight) {
  CHECK(write_and_multiply(kSumsTouched).find("was written while products were in flight") != std::string::npos);
}
