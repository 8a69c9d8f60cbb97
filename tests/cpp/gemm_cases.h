// Inputs and a comparison for the three GEMM ops: one Problem, run by any kernel set, gives every output as bytes.
#pragma once
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace test {

struct Shape {
  std::vector<int32_t> rows;  // per expert
  int64_t N, K, tail;         // tail: rows past the last expert
  bool gather;
  const char* values;  // "unit", "tiny" (products and sums around the smallest normal), "huge" (overflow)
};

inline const std::vector<Shape>& gemm_shapes() {
  static const std::vector<Shape> shapes = {
      {{1}, 1, 1, 0, false, "unit"},        {{1}, 48, 64, 0, false, "unit"},
      {{1}, 130, 97, 0, false, "tiny"},     {{3, 0, 33, 1}, 34, 65, 2, true, "unit"},
      {{0, 0}, 18, 40, 3, true, "unit"},    {{17, 16, 15}, 66, 31, 0, false, "tiny"},
      {{40, 7}, 32, 33, 1, true, "huge"},   {{5, 31}, 258, 32, 0, true, "tiny"},
      {{64}, 64, 2080, 0, false, "unit"},    // more depth than one chunk of the AMX kernel
      {{2085}, 18, 16, 0, true, "unit"},     // the same for wgrad; many row blocks for the others
      {{300, 2}, 20, 70, 0, false, "unit"},  // more rows than one block
      {{2}, 1100, 34, 0, false, "unit"},     // more columns than one block
      {{9}, 6, 530, 0, true, "tiny"},
  };
  return shapes;
}

struct KernelSet {
  void (*forward)(const glmx::GroupedGemmParams&);
  void (*dgrad)(const glmx::GroupedGemmDgradParams&);
  void (*wgrad)(const glmx::GroupedGemmWgradParams&);
};

inline float random_value(std::mt19937& rng, const std::string& values) {
  const float unit = (static_cast<float>(rng() >> 8) / 8388608.0f - 1.0f);
  if (values == "unit") return unit;
  if (values == "huge") return std::ldexp(unit, 50 + static_cast<int>(rng() % 16));
  if (rng() % 16 == 0) return std::ldexp(unit, -126 - static_cast<int>(rng() % 8));  // denormal
  return std::ldexp(unit, -55 - static_cast<int>(rng() % 12));
}

inline uint16_t bf16_of(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Every output of forward, dgrad and wgrad on this shape, in fp32 words (bf16 outputs are widened). NaNs are made equal.
// Outputs are exactly as large as the contract says, and inputs too, so that ASan sees a read or write past them.
inline std::vector<uint32_t> run_gemms(const Shape& s, glmx::DType dtype, const KernelSet& kernels) {
  using glmx::DType;
  std::mt19937 rng(7);
  const int64_t E = static_cast<int64_t>(s.rows.size()), size = glmx::dtype_size(dtype);
  std::vector<int32_t> offsets(1, 0);
  for (int32_t n : s.rows) offsets.push_back(offsets.back() + n);
  const int64_t R = offsets.back() + s.tail, M = s.gather ? R / 2 + 1 : R;
  std::vector<int32_t> row_token(R, -1);
  for (int64_t r = 0; r < offsets.back(); ++r) row_token[r] = static_cast<int32_t>(rng() % M);
  const auto matrix = [&](int64_t elements) {
    std::vector<char> out(elements * size);
    for (int64_t i = 0; i < elements; ++i) {
      const float f = random_value(rng, s.values);
      const uint16_t h = bf16_of(f);
      std::memcpy(out.data() + i * size, size == 2 ? static_cast<const void*>(&h) : &f, size);
    }
    return out;
  };
  const std::vector<char> x = matrix(M * s.K), w = matrix(E * s.N * s.K), dy = matrix(R * s.N), bias = matrix(E * s.N);
  const std::vector<char> start = matrix(E * s.N * s.K * (size == 2 ? 2 : 1));
  std::vector<uint32_t> bits;
  const auto keep = [&](const std::vector<char>& out, DType type) {
    for (size_t i = 0; i < out.size(); i += glmx::dtype_size(type)) {
      uint32_t word = 0;
      if (type == DType::bf16) {
        uint16_t half;
        std::memcpy(&half, out.data() + i, 2);
        word = uint32_t{half} << 16;
      } else {
        std::memcpy(&word, out.data() + i, 4);
      }
      bits.push_back((word & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : word);
    }
  };
  const int32_t* tokens = s.gather ? row_token.data() : nullptr;
  const std::vector<DType> out_dtypes = dtype == DType::bf16 ? std::vector<DType>{DType::f32, DType::bf16} : std::vector<DType>{DType::f32};
  for (DType out_dtype : out_dtypes) {
    const int64_t out_size = glmx::dtype_size(out_dtype);
    for (int variant = 0; variant < 4; ++variant) {  // bias, silu_mul
      const bool silu = variant >= 2;
      if (silu && s.N % 2 != 0) continue;
      std::vector<char> out(R * (silu ? s.N / 2 : s.N) * out_size, 0x55), preact(silu ? R * s.N * size : 0, 0x55);
      glmx::GroupedGemmParams p{};
      p.x = x.data(), p.w = w.data(), p.bias = variant % 2 ? bias.data() : nullptr, p.expert_offsets = offsets.data(), p.row_token = tokens;
      p.out = out.data(), p.preact = silu ? preact.data() : nullptr, p.M = M, p.R = R, p.N = s.N, p.K = s.K, p.E = E;
      p.dtype = dtype, p.out_dtype = out_dtype, p.silu_mul = silu;
      kernels.forward(p);
      keep(out, out_dtype);
      keep(preact, dtype);
    }
    std::vector<char> dx(R * s.K * out_size, 0x55);
    kernels.dgrad({dy.data(), w.data(), offsets.data(), dx.data(), R, s.N, s.K, E, dtype, out_dtype});
    keep(dx, out_dtype);
    for (bool accumulate : {false, true}) {
      if (accumulate && out_dtype != DType::f32) continue;
      std::vector<char> dw = accumulate ? start : std::vector<char>(E * s.N * s.K * out_size, 0x55);
      if (accumulate && size == 2) dw.resize(E * s.N * s.K * 4);
      kernels.wgrad({dy.data(), x.data(), offsets.data(), tokens, dw.data(), M, R, s.N, s.K, E, dtype, out_dtype, accumulate});
      keep(dw, out_dtype);
    }
  }
  return bits;
}

struct StoredCase {
  int64_t rows, E, N, K;  // rows of all experts together; N of a matrix
  bool silu_mul;
};

inline const std::vector<StoredCase>& stored_cases() {
  static const std::vector<StoredCase> cases = {{1, 1, 16, 128, false}, {1, 1, 33, 97, true},    {3, 1, 48, 256, false},
                                                {7, 3, 66, 300, true},  {40, 2, 130, 520, true}, {1, 1, 150, 2180, false},
                                                {100, 2, 70, 260, true}};
  return cases;
}

// The bits of a forward with stored weights of random values; with a bias, scales of either dtype.
inline std::vector<float> run_stored(const StoredCase& s, glmx::StoredFormat format, glmx::DType scale_dtype,
                                     void (*forward)(const glmx::GroupedGemmParams&)) {
  using glmx::StoredFormat;
  std::mt19937 rng(11);
  const int64_t parts = s.silu_mul ? 2 : 1, matrices = s.E * parts, groups = (s.K + 127) / 128;
  const int64_t row_bytes = format == StoredFormat::int4 ? (s.K + 7) / 8 * 4 : format == StoredFormat::bf16 ? s.K * 2 : s.K;
  const int64_t scales = format == StoredFormat::int4         ? s.N * groups
                         : format == StoredFormat::fp8_blocks ? (s.N + 127) / 128 * groups
                                                              : s.N;
  std::vector<std::vector<uint8_t>> values, scale;
  for (int64_t i = 0; i < matrices; ++i) {
    values.emplace_back(s.N * row_bytes);
    for (size_t j = 0; j < values.back().size(); ++j) {
      const bool fp8 = format == StoredFormat::fp8 || format == StoredFormat::fp8_blocks;
      values.back()[j] = static_cast<uint8_t>(rng() >> 7);
      if (fp8 && (values.back()[j] & 0x7f) == 0x7f) values.back()[j] = 0;
    }
    for (int64_t j = 0; format == StoredFormat::bf16 && j < s.N * s.K; ++j) {
      const uint16_t half = bf16_of(random_value(rng, "unit"));
      std::memcpy(values.back().data() + 2 * j, &half, 2);
    }
    scale.emplace_back(scales * (scale_dtype == glmx::DType::bf16 ? 2 : 4));
    for (int64_t j = 0; j < scales; ++j) {
      const float f = 0.01f + 0.001f * random_value(rng, "unit");
      const uint16_t half = bf16_of(f);
      if (scale_dtype == glmx::DType::bf16) std::memcpy(scale.back().data() + 2 * j, &half, 2);
      if (scale_dtype == glmx::DType::f32) std::memcpy(scale.back().data() + 4 * j, &f, 4);
    }
  }
  std::vector<int64_t> table;
  for (const auto& v : values) table.push_back(reinterpret_cast<int64_t>(v.data()));
  for (const auto& v : scale) table.push_back(reinterpret_cast<int64_t>(v.data()));
  std::vector<uint16_t> x(s.rows * s.K), bias(s.E * s.N * parts);
  for (uint16_t& h : x) h = bf16_of(random_value(rng, "unit"));
  for (uint16_t& h : bias) h = bf16_of(random_value(rng, "unit"));
  std::vector<int32_t> offsets;
  for (int64_t e = 0; e <= s.E; ++e) offsets.push_back(static_cast<int32_t>(s.rows * e / s.E));
  std::vector<float> out(s.rows * s.N, -1.0f);
  glmx::GroupedGemmParams p{};
  p.x = x.data(), p.bias = bias.data(), p.expert_offsets = offsets.data(), p.out = out.data();
  p.M = p.R = s.rows, p.N = s.N * parts, p.K = s.K, p.E = s.E, p.dtype = glmx::DType::bf16, p.out_dtype = glmx::DType::f32;
  p.silu_mul = s.silu_mul, p.stored = {table.data(), format, scale_dtype};
  forward(p);
  return out;
}

}  // namespace test
