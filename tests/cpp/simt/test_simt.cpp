// gx on the CPU that plays GPU: collectives, barriers, late copies, fragments, and each fault that it must notice.
#include "core/parallel.h"
#include "kernels_for_tests.h"

using namespace simt_test;

namespace {

const glmx::Device kDevice{};

template <class Kernel, class... Args>
std::string launch_error(const char* name, Kernel kernel, int block, size_t shared, const Args&... args) {
  return error_of([&] { gx::launch(name, kernel, dim3(2), block, shared, kDevice, args...); });
}
bool says(const std::string& error, const std::string& what) { return error.find(what) != std::string::npos; }

}  // namespace

// ---- Collectives ----------------------------------------------------------------------------------------------------------------------

namespace {

__global__ void collect(int32_t* exchanged, double* broadcast, uint32_t* votes, int32_t* counts) {
  const auto t = static_cast<int>(threadIdx.x), at = static_cast<int>(blockIdx.x * blockDim.x) + t;
  exchanged[at] = gx::shuffle_xor(t, 5);
  broadcast[at] = gx::shuffle(t + 0.25, 7);
  votes[at] = gx::ballot(t % 3 == 0);
  counts[at] = gx::barrier_count(t % 5 == 0) * 1000 + gx::barrier_count(true);
}

// Each team counts; the first thread of the block adds what the teams have left in shared memory.
__global__ void sum_rows(const float* x, float* sums, int n, bool with_barrier) {
  __shared__ float part[8];
  float sum = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) sum = sum + x[static_cast<int>(blockIdx.x) * n + i];
  for (int half = 16; half > 0; half /= 2) sum = sum + gx::shuffle_xor(sum, half);
  if (gx::lane() == 0) part[gx::team()] = sum;
  if (with_barrier) gx::barrier();
  if (threadIdx.x == 100) {
    float all = 0.0f;
    for (int team = 0; team < static_cast<int>(blockDim.x) / gx::kTeam; ++team) all = all + part[team];
    sums[blockIdx.x] = all;
  }
}

// Lanes leave a value for their neighbour.
__global__ void neighbours(int32_t* out, bool with_barrier) {
  __shared__ int32_t values[64];
  values[threadIdx.x] = static_cast<int32_t>(threadIdx.x);
  if (with_barrier) gx::team_barrier();
  const int neighbour = static_cast<int>(threadIdx.x) ^ 1;
  out[threadIdx.x] = values[neighbour];
}

// Teams 0 and 1 hand a value to each other through named barriers; teams 2 and 3 take no part.
__global__ void hand_over(int32_t* out) {
  __shared__ int32_t value;
  if (gx::team() == 0) {
    if (gx::lane() == 0) value = 42;
    gx::barrier(3, 64);
  } else if (gx::team() == 1) {
    gx::barrier(3, 64);
    out[gx::lane()] = value;
  }
}

__global__ void tickets(int32_t* next, int32_t* taken) { taken[gx::atomic_add(next, 1)] = 1; }

// Each block waits for the one that took the ticket before it.
__global__ void chain(int32_t* next, int32_t* flags, int32_t* order) {
  __shared__ int32_t ticket;
  if (threadIdx.x == 0) ticket = gx::atomic_add(next, 1);
  gx::barrier();
  if (threadIdx.x == 0) {
    while (ticket > 0 && gx::observe(&flags[ticket - 1]) == 0) {
    }
    order[ticket] = ticket;
    gx::publish(&flags[ticket], 1);
  }
}

}  // namespace

TEST(simt, collectives) {
  in_every_order([](const char* order) {
    constexpr int kThreads = 128, kAll = 2 * kThreads;
    std::vector<int32_t> exchanged(kAll), counts(kAll);
    std::vector<double> broadcast(kAll);
    std::vector<uint32_t> votes(kAll);
    gx::launch("collect", collect, dim3(2), kThreads, 0, kDevice, exchanged.data(), broadcast.data(), votes.data(), counts.data());
    for (int i = 0; i < kAll; ++i) {
      const auto at = static_cast<size_t>(i);
      const int t = i % kThreads, first = t / 32 * 32;
      uint32_t vote = 0;
      for (int lane = 0; lane < 32; ++lane) vote |= uint32_t{(first + lane) % 3 == 0} << lane;
      CHECK(exchanged[at] == (t ^ 5) && broadcast[at] == first + 7.25 && votes[at] == vote, order, " thread ", i);
      CHECK(counts[at] == 26 * 1000 + 128, order, " thread ", i, ": ", counts[at]);
    }
  });
}

TEST(simt, block_barrier_orders_static_shared_memory) {
  const int n = 500, blocks = 5;
  std::vector<float> x(static_cast<size_t>(n * blocks)), sums(blocks);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 17);
  in_every_order([&](const char* order) {
    for (const bool with_barrier : {true, false}) {
      gx::launch("sum_rows", sum_rows, dim3(blocks), 256, 0, kDevice, x.data(), sums.data(), n, with_barrier);
      int wrong = 0;
      for (int b = 0; b < blocks; ++b) {
        float want = 0.0f;
        for (int i = 0; i < n; ++i) want += x[static_cast<size_t>(b * n + i)];
        wrong += sums[static_cast<size_t>(b)] != want;
      }
      CHECK(with_barrier ? wrong == 0 : wrong > 0, order, with_barrier ? "" : ": the missing barrier", " left ", wrong, " sums wrong");
    }
  });
}

TEST(simt, team_barrier_orders_lanes) {
  in_every_order([](const char* order) {
    for (const bool with_barrier : {true, false}) {
      std::vector<int32_t> out(64);
      gx::launch("neighbours", neighbours, dim3(1), 64, 0, kDevice, out.data(), with_barrier);
      int wrong = 0;
      for (int i = 0; i < 64; ++i) wrong += out[static_cast<size_t>(i)] != (i ^ 1);
      CHECK(with_barrier ? wrong == 0 : wrong > 0, order, ": ", wrong);
    }
  });
}

TEST(simt, named_barriers_atomics_and_blocks_that_wait) {
  in_every_order([](const char* order) {
    std::vector<int32_t> out(32), taken(256), flags(9), chained(9);
    int32_t next = 0;
    gx::launch("hand_over", hand_over, dim3(1), 128, 0, kDevice, out.data());
    CHECK(std::count(out.begin(), out.end(), 42) == 32, order);
    gx::launch("tickets", tickets, dim3(4), 64, 0, kDevice, &next, taken.data());
    CHECK(next == 256 && std::count(taken.begin(), taken.end(), 1) == 256, order);
    next = 0;
    gx::launch("chain", chain, dim3(9), 64, 0, kDevice, &next, flags.data(), chained.data());
    for (int i = 0; i < 9; ++i) CHECK(chained[static_cast<size_t>(i)] == i, order);
  });
}

TEST(simt, denormals_are_flushed) {
  static float sum;
  gx::launch(
      "tiny",
      +[](float a, float b) {
        if (threadIdx.x == 0) sum = a * b;
      },
      dim3(1), 64, 0, kDevice, 0x1p-100f, 0x1p-40f);
  CHECK(sum == 0.0f);
  const volatile float a = 0x1p-100f;
  CHECK(a * 0x1p-40f != 0.0f, "the caller's rounding environment was not restored");
}

// ---- Faults of threads ----------------------------------------------------------------------------------------------------------------

namespace {

enum class Wrong { lanes_at_two_collectives, two_lines, lane_ended, part_of_block, two_barriers, named_too_few, id, threads, require };

__global__ void wrong(Wrong how, int32_t* sink) {
  const auto t = static_cast<int>(threadIdx.x);
  switch (how) {
    case Wrong::lanes_at_two_collectives: sink[t] = t % 2 == 0 ? gx::shuffle_xor(t, 1) : static_cast<int32_t>(gx::ballot(true)); break;
    case Wrong::two_lines:
      if (t % 2 == 0) {
        gx::team_barrier();
      } else {
        gx::team_barrier();
      }
      break;
    case Wrong::lane_ended:
      if (t == 40) return;
      sink[t] = gx::shuffle_xor(t, 1);
      break;
    case Wrong::part_of_block:
      if (t < 48) gx::barrier();
      if (t >= 48) sink[t] = gx::shuffle_xor(t, 1);
      break;
    case Wrong::two_barriers:
      if (t < 64) gx::barrier();
      gx::barrier();
      break;
    case Wrong::named_too_few:
      if (t < 64) gx::barrier(2, 96);
      break;
    case Wrong::id: gx::barrier(16, 128); break;
    case Wrong::threads: gx::barrier(1, 48); break;
    case Wrong::require: gx::require(t != 70); break;
  }
}

// What a thread does alone.
__global__ void alone(int how, unsigned char* global) {
  GX_DYNAMIC_SHARED(unsigned char, shared);
  if (threadIdx.x != 33) return;
  if (how == 0) gx::copy_async16(shared + 8, global, true);
  if (how == 1) gx::copy_async16(shared, global + 8, true);
  if (how == 2) gx::copy_async16(global, global, true);
  if (how == 3) gx::copy_async16(shared + 1024, global, true);
  if (how == 4) gx::store16(shared + 4, {});
  if (how == 5) gx::load16(global + 4);
  if (how == 6) shared[1024 + 7] = 1;
  if (how == 7) {  // what a frame that is too large does: it writes the last word of the stack
    const uintptr_t here = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
    *reinterpret_cast<volatile uint64_t*>(here & ~(gx::simt::kStackBytes - 1)) = 0;
  }
}

__global__ void poll_for_ever(const int32_t* flag) {
  while (threadIdx.x == 0 && gx::observe(flag) == 0) {
  }
}

}  // namespace

TEST(simt, faults_of_threads) {
  const struct {
    Wrong how;
    const char* message;
  } kCases[] = {
      {Wrong::lanes_at_two_collectives, "of its 32 wait at"},
      {Wrong::two_lines, "divergence: it comes to team_barrier in test_simt.cpp:"},
      {Wrong::lane_ended, "1 threads (40..40) have ended"},
      {Wrong::part_of_block, "48 threads (0..47) wait at barrier() in test_simt.cpp:"},
      {Wrong::two_barriers, "divergence: it comes to barrier() in test_simt.cpp:"},
      {Wrong::named_too_few, "64 threads (0..63) wait at barrier(id, threads) in test_simt.cpp:"},
      {Wrong::id, "barrier(16, 128): the id is not in [1, 15]"},
      {Wrong::threads, "barrier(1, 48): the threads are not a multiple of 32"},
      {Wrong::require, "thread 70: require()"},
  };
  in_every_order([&](const char* order) {
    for (const auto& c : kCases) {
      std::vector<int32_t> sink(128);
      const std::string error = launch_error("wrong", wrong, 128, 0, c.how, sink.data());
      CHECK(says(error, "wrong: block (") && says(error, ", 0): "), order, ": ", error);
      const bool lane_ended = c.how == Wrong::lane_ended && says(error, "1 of its 32 have ended");  // which of the two depends on the order
      CHECK(says(error, c.message) || lane_ended, order, ": ", error);
    }
  });
}

TEST(simt, faults_of_memory) {
  const Aligned<unsigned char> global(std::vector<unsigned char>(64));
  const char* const kMessages[] = {"copy_async16: ",
                                   "copy_async16: the source",
                                   "is not shared memory of this block",
                                   "is not shared memory of this block",
                                   "store16: ",
                                   "load16: ",
                                   "a store past the end of dynamic shared memory",
                                   "overflowed its stack"};
  for (int how = 0; how < 8; ++how) {
    const std::string error = launch_error("alone", alone, 64, 1024, how, global.data());
    CHECK(says(error, "alone: block (") && says(error, kMessages[how]), how, ": ", error);
  }
}

TEST(simt, limits_of_a_launch) {
  const auto nothing = +[](int) {};
  CHECK(says(launch_error("nothing", nothing, 96, 0, 1), "a multiple of 64: got 96"));
  CHECK(says(launch_error("nothing", nothing, 2048, 0, 1), "64..1024 threads"));
  CHECK(says(launch_error("nothing", nothing, 64, 228 << 10, 1), "bytes of shared memory"));
  gx::simt::set_architecture(80);
  CHECK(says(launch_error("nothing", nothing, 64, 164 << 10, 1), "bytes of shared memory"));
  gx::simt::set_architecture(90);
  CHECK(launch_error("nothing", nothing, 64, 164 << 10, 1).empty());
}

// ---- Asynchronous copies and fragments ------------------------------------------------------------------------------------------------

namespace {

enum Skip { kNothing, kWait, kCommit, kBarrier, kLastBarrier };

// c[16, 16] += a[16, k] b[16, k]^T over two stages of cp.async; kTransposed: a and b are stored [k, 16].
template <bool kTransposed>
__global__ void small_gemm(const uint16_t* a, const uint16_t* b, float* c, int steps, Skip skip) {
  GX_DYNAMIC_SHARED(uint16_t, stages);
  const auto t = static_cast<int>(threadIdx.x);
  const auto load = [&](int step) {
    uint16_t* const to = stages + step % 2 * 512;
    const int tile = t / 32, row = t % 32 / 2, half = t % 2 * 8;
    const uint16_t* const from = tile == 0 ? a : b;
    const int at = kTransposed ? (step * 16 + row) * 16 + half : row * steps * 16 + step * 16 + half;
    gx::copy_async16(to + tile * 256 + row * 16 + half, from + at, true);
    if (skip != kCommit) gx::commit();
  };
  gx::FragC sums[2] = {};
  load(0);
  for (int step = 0; step < steps; ++step) {
    const bool more = step + 1 < steps;
    if (more) load(step + 1);
    if (skip != kWait) {
      if (more) {
        gx::wait<1>();
      } else {
        gx::wait<0>();
      }
    }
    if (skip != kBarrier) gx::barrier();
    const uint16_t* const stage = stages + step % 2 * 512;
    gx::FragA fa;
    gx::FragB fb[2];
    if (kTransposed) {
      gx::load_a_transposed(fa, stage + gx::load_a_transposed_k() * 16 + gx::load_a_transposed_m());
      gx::load_b_pair_transposed(fb, stage + 256 + gx::load_b_transposed_k() * 16 + gx::load_b_transposed_n());
    } else {
      gx::load_a(fa, stage + gx::load_a_m() * 16 + gx::load_a_k());
      gx::load_b_pair(fb, stage + 256 + gx::load_b_n() * 16 + gx::load_b_k());
    }
    gx::mma(sums[0], fa, fb[0]);
    gx::mma(sums[1], fa, fb[1]);
    if (skip != kLastBarrier) gx::barrier();
  }
  const int j = t / 32;  // each team has all sums and stores half of them
  for (int i = 0; i < 4; ++i) c[gx::FragC::row(i) * 16 + j * 8 + gx::FragC::col(i)] = sums[j].v[i];
}

template <bool kTransposed>
bool small_gemm_is_right(Skip skip) {
  constexpr int kSteps = 5, kDepth = kSteps * 16;
  const Aligned<uint16_t> a(random_bf16(16 * kDepth, 3)), b(random_bf16(16 * kDepth, 4));
  std::vector<float> got(256, 7.0f), want(256);
  gx::launch("small_gemm", small_gemm<kTransposed>, dim3(1), 64, 2048, kDevice, a.data(), b.data(), got.data(), kSteps, skip);
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      float sum = 0.0f;  // one FMA for each k, as mma() has it
      for (int k = 0; k < kDepth; ++k) {
        const auto at = [&](const Aligned<uint16_t>& x, int row) {
          return gx::load(x.data() + (kTransposed ? k * 16 + row : row * kDepth + k));
        };
        sum = std::fma(at(a, m), at(b, n), sum);
      }
      want[static_cast<size_t>(m * 16 + n)] = sum;
    }
  }
  return same_bits(got, want);
}

__global__ void zeros(uint32_t* out, const unsigned char* global) {
  GX_DYNAMIC_SHARED(uint32_t, words);
  __shared__ uint32_t fixed[64];
  if (global == nullptr) fixed[threadIdx.x] = 0;  // never: a compiler that sees no store would take the loads for zeros
  const auto t = static_cast<int>(threadIdx.x);
  gx::copy_async16(words + t * 4, global, t % 2 == 0);
  out[t * 3] = words[t * 4];
  gx::commit();
  gx::wait<0>();
  out[t * 3 + 1] = words[t * 4 + 3];
  out[t * 3 + 2] = fixed[t];
}

}  // namespace

TEST(simt, copies_and_fragments_match_loops) {
  // A missing barrier shows in some orders only; a wait that is not there in all.
  for (const Skip skip : {kNothing, kWait, kCommit, kBarrier, kLastBarrier}) {
    int right = 0, all = 0;
    in_every_order([&](const char*) {
      right += small_gemm_is_right<false>(skip) + small_gemm_is_right<true>(skip);
      all += 2;
    });
    if (skip == kNothing) CHECK(right == all, right, " of ", all);
    if (skip == kWait || skip == kCommit) CHECK(right == 0, skip, ": ", right, " of ", all);
    if (skip == kBarrier || skip == kLastBarrier) CHECK(right < all, skip, ": not noticed");
  }
}

TEST(simt, shared_memory_is_poison_until_a_copy_is_waited_for) {
  const Aligned<unsigned char> global(std::vector<unsigned char>(16, 0x11));
  std::vector<uint32_t> out(64 * 3);
  for (int turn = 0; turn < 2; ++turn) {  // the second block finds nothing of the first
    gx::launch("zeros", zeros, dim3(1), 64, 1024, kDevice, out.data(), global.data());
    for (int t = 0; t < 64; ++t) {
      const uint32_t* got = &out[static_cast<size_t>(t * 3)];
      CHECK(got[0] == 0xffffffffu && got[1] == (t % 2 == 0 ? 0x11111111u : 0u) && got[2] == 0xffffffffu, "thread ", t);
    }
  }
}

TEST(simt, errors_name_kernel_and_block_and_leave_nothing_behind) {
  std::vector<int32_t> sink(128);
  const std::string error = launch_error("named_here", wrong, 128, 0, Wrong::require, sink.data());
  CHECK(says(error, "named_here: block (0, 0): thread 70: "), error);
  CHECK(small_gemm_is_right<false>(kNothing));
}

TEST(simt, blocks_that_poll_in_vain) {
  if (std::getenv("GLMX_STRICT") == nullptr) SKIP("takes the scheduler's patience of 20 s: GLMX_STRICT=1 runs it");
  static int32_t flag = 0;
  const int32_t* const never = &flag;
  CHECK(says(launch_error("poll_for_ever", poll_for_ever, 64, 0, never), "poll for what no other block writes"));
}
