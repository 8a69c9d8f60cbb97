// grouped_gemm, dgrad and wgrad: every kernel this machine can run against base, bit for bit; base against the tree written down plainly.
#include "core/features.h"
#include "gemm_cases.h"
#include "harness.h"

namespace {

using glmx::DType;
using glmx::Isa;
namespace cpu = glmx::cpu;

const test::KernelSet kBase{cpu::base::grouped_gemm, cpu::base::grouped_gemm_dgrad, cpu::base::grouped_gemm_wgrad};
const test::KernelSet kAvx2{cpu::avx2::grouped_gemm, cpu::avx2::grouped_gemm_dgrad, cpu::avx2::grouped_gemm_wgrad};
const test::KernelSet kAvx512{cpu::avx512::grouped_gemm, cpu::avx512::grouped_gemm_dgrad, cpu::avx512::grouped_gemm_wgrad};
const test::KernelSet kPairs{cpu::avx512_bf16::grouped_gemm, cpu::avx512_bf16::grouped_gemm_dgrad, cpu::avx512_bf16::grouped_gemm_wgrad};
const test::KernelSet kAmx{cpu::amx::grouped_gemm, cpu::amx::grouped_gemm_dgrad, cpu::amx::grouped_gemm_wgrad};

void equal_to_base(const test::KernelSet& kernels, DType dtype) {
  int at = 0;
  for (const test::Shape& shape : test::gemm_shapes()) {
    const std::vector<uint32_t> want = test::run_gemms(shape, dtype, kBase), got = test::run_gemms(shape, dtype, kernels);
    size_t differ = 0, first = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      if (want[i] != got[i] && differ++ == 0) first = i;
    }
    CHECK(differ == 0, "shape ", at, ": ", differ, " of ", want.size(), " words differ, the first at ", first);
    ++at;
  }
}

void stored_equals_base(const test::KernelSet& kernels) {
  for (glmx::StoredFormat format : {glmx::StoredFormat::bf16, glmx::StoredFormat::int8, glmx::StoredFormat::int4, glmx::StoredFormat::fp8,
                                    glmx::StoredFormat::fp8_blocks}) {
    for (DType scale : {DType::f32, DType::bf16}) {
      int at = 0;
      for (const test::StoredCase& c : test::stored_cases()) {
        const std::vector<float> want = test::run_stored(c, format, scale, kBase.forward);
        const std::vector<float> got = test::run_stored(c, format, scale, kernels.forward);
        CHECK(std::memcmp(want.data(), got.data(), want.size() * 4) == 0, "stored case ", at, " of format ", static_cast<int>(format),
              " differs");
        ++at;
      }
    }
  }
}

TEST(gemm, avx2_equals_base) {
  if (glmx::machine_isa() < Isa::avx2) SKIP("this CPU has no avx2");
  equal_to_base(kAvx2, DType::bf16);
  equal_to_base(kAvx2, DType::f32);
  stored_equals_base(kAvx2);
}

TEST(gemm, avx512_equals_base) {
  if (glmx::machine_isa() < Isa::avx512) SKIP("this CPU has no avx512");
  equal_to_base(kAvx512, DType::bf16);
  equal_to_base(kAvx512, DType::f32);
  stored_equals_base(kAvx512);
}

TEST(gemm, avx512_bf16_equals_base) {
  if (glmx::machine_isa() < Isa::avx512_bf16) SKIP("this CPU has no avx512_bf16");
  equal_to_base(kPairs, DType::bf16);
  stored_equals_base(kPairs);
}

// The kernel packs and stores with AVX-512; its tiles are the software twin's.
TEST(amx, software_twin_equals_base) {
  if (glmx::machine_isa() < Isa::avx512) SKIP("this CPU has no avx512");
  equal_to_base(kAmx, DType::bf16);
  stored_equals_base(kAmx);
}

// A sum that was flushed to -0, then a last block of 2 steps whose products are flushed to -0: the 30 steps of zeros behind them make its
// chains +0 and the sum +0. A kernel that leaves those steps out without a thought stores -0.
TEST(gemm, padded_steps_are_not_free) {
  const int64_t K = 66;
  std::vector<uint16_t> x(K, 0), w(K, 0);
  const float tiny = std::ldexp(1.0f, -126), small = std::ldexp(1.0f, -70);
  x[0] = test::bf16_of(-1.5f), w[0] = test::bf16_of(tiny);
  x[32] = test::bf16_of(1.25f), w[32] = test::bf16_of(tiny);
  for (int64_t k : {64, 65}) x[k] = test::bf16_of(-small), w[k] = test::bf16_of(small);
  const int32_t offsets[2] = {0, 1};
  const Isa isa = glmx::machine_isa();
  std::vector<const test::KernelSet*> sets = {&kBase};
  if (isa >= Isa::avx2) sets.push_back(&kAvx2);
  if (isa >= Isa::avx512) sets.insert(sets.end(), {&kAvx512, &kAmx});
  if (isa >= Isa::avx512_bf16) sets.push_back(&kPairs);
  for (const test::KernelSet* kernels : sets) {
    uint32_t out = 1;
    glmx::GroupedGemmParams p{};
    p.x = x.data(), p.w = w.data(), p.expert_offsets = offsets, p.out = &out;
    p.M = 1, p.R = 1, p.N = 1, p.K = K, p.E = 1, p.dtype = DType::bf16, p.out_dtype = DType::f32;
    kernels->forward(p);
    CHECK(out == 0, "bits ", out);
  }
}

// No step is left out: the tree of ops.h in five lines.
float tree(const float* a, const float* b, int64_t depth) {
  float c = 0.0f;
  for (int64_t k0 = 0; k0 < depth; k0 += 32) {
    float chain[2] = {0.0f, 0.0f};
    for (int64_t k = k0; k < k0 + 32; ++k) chain[k % 2] = std::fma(k < depth ? a[k] : 0.0f, k < depth ? b[k] : 0.0f, chain[k % 2]);
    c = c + (chain[0] + chain[1]);
  }
  return c;
}

TEST(gemm, base_follows_the_tree) {
  std::mt19937 rng(3);
  for (int64_t K : {1, 2, 31, 32, 33, 64, 97, 300}) {
    const int64_t M = 7, N = 19;
    std::vector<float> x(M * K), w(N * K), out(M * N);
    for (float& f : x) f = test::random_value(rng, "unit");
    for (float& f : w) f = test::random_value(rng, "unit");
    const int32_t offsets[2] = {0, static_cast<int32_t>(M)};
    glmx::GroupedGemmParams p{};
    p.x = x.data(), p.w = w.data(), p.expert_offsets = offsets, p.out = out.data();
    p.M = M, p.R = M, p.N = N, p.K = K, p.E = 1, p.dtype = DType::f32, p.out_dtype = DType::f32;
    kBase.forward(p);
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t n = 0; n < N; ++n) {
        const float want = tree(&x[m * K], &w[n * K], K);
        CHECK(std::memcmp(&want, &out[m * N + n], 4) == 0, "K ", K, " m ", m, " n ", n, ": ", out[m * N + n], ", the tree gives ", want);
      }
    }
  }
}

}  // namespace
