// Storage types: what an element of a tensor is in memory. Arithmetic is fp32 (fp64 where an op says so).
#pragma once
#include <cstdint>

namespace glmx {

enum class DType : int32_t { f32 = 0, bf16 = 1, f64 = 2, i32 = 3, i64 = 4 };

inline constexpr const char* dtype_name(DType t) {
  return t == DType::f32 ? "fp32" : t == DType::bf16 ? "bf16" : t == DType::f64 ? "fp64" : t == DType::i32 ? "int32" : "int64";
}

inline constexpr int64_t dtype_size(DType t) { return t == DType::bf16 ? 2 : (t == DType::f32 || t == DType::i32) ? 4 : 8; }

}  // namespace glmx
