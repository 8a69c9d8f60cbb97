// Unpacking torch::stable tensors into Params: dtype, rank, layout and device are checked here, with the argument's name.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "core/check.h"
#include "core/recording.h"
#include "glmx/ops.h"

namespace glmx::bind {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Double: return DType::f64;
    case ScalarType::Int: return DType::i32;
    case ScalarType::Long: return DType::i64;
    default: detail::fail(name, ": unsupported dtype; expected fp32, bf16, int32 or int64");
  }
}

// "cpu", "cuda:0".
std::string device_name(const Tensor& t);

// Where a call runs: on the device of one of its inputs, `like`, which is current for the life of this object. Every tensor of the call
// must be there (`data`). A CPU tensor runs the GPU's kernels where simt is loaded.
class Call {
 public:
  Call(const Tensor& like, const char* name);
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  const Device& device() const { return device_; }
  // That `t` is where the call of this thread runs; without one, on the CPU.
  static void check_device(const Tensor& t, const char* name);

 private:
  Device device_;
  const char* name_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// The data of a dense tensor of this dtype, on the device of the call; kAny in shape accepts any size.
inline constexpr int64_t kAny = -1;
inline void* data(const Tensor& t, const char* name, DType dtype, std::initializer_list<int64_t> shape) {
  Call::check_device(t, name);
  const DType got = dtype_of(t, name);
  GLMX_CHECK(got == dtype, name, ": expected dtype ", dtype_name(dtype), ": got ", dtype_name(got));
  GLMX_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor: got strides of a view, shape ", shape_of(t));
  GLMX_CHECK(t.dim() == static_cast<int64_t>(shape.size()), name, ": expected ", shape.size(), " dimensions: got shape ", shape_of(t));
  int64_t i = 0;
  for (int64_t want : shape) {
    GLMX_CHECK(want == kAny || t.size(i) == want, name, ": expected size ", want, " in dimension ", i, ": got shape ", shape_of(t));
    ++i;
  }
  return t.data_ptr();
}

// The data of a tensor of this dtype and rank, on the device of the call, whose last dimension is dense; the others may have any stride.
// The caller reads size(i) and stride(i).
inline void* view_data(const Tensor& t, const char* name, DType dtype, int64_t dim) {
  Call::check_device(t, name);
  const DType got = dtype_of(t, name);
  GLMX_CHECK(got == dtype, name, ": expected dtype ", dtype_name(dtype), ": got ", dtype_name(got));
  GLMX_CHECK(t.dim() == dim, name, ": expected ", dim, " dimensions: got shape ", shape_of(t));
  GLMX_CHECK(t.numel() == 0 || t.size(dim - 1) == 1 || t.stride(dim - 1) == 1, name, ": expected stride 1 in the last dimension: got ",
             t.stride(dim - 1));
  return t.data_ptr();
}

// fp32 or bf16.
inline DType model_dtype(const Tensor& t, const char* name) {
  const DType d = dtype_of(t, name);
  GLMX_CHECK(d == DType::f32 || d == DType::bf16, name, ": expected dtype fp32 or bf16: got ", dtype_name(d));
  return d;
}

template <class T>
T* data_as(const Tensor& t, const char* name, DType dtype, std::initializer_list<int64_t> shape) {
  return static_cast<T*>(data(t, name, dtype, shape));
}

// Null for an absent optional tensor.
template <class T>
T* data_or_null(const std::optional<Tensor>& t, const char* name, DType dtype, std::initializer_list<int64_t> shape) {
  return t.has_value() ? static_cast<T*>(data(*t, name, dtype, shape)) : nullptr;
}

// The sequences of T query rows over key_rows rows of keys; the host function checks what they hold.
inline Sequences sequences(const Tensor& cu_seqlens_q, const Tensor& seq_lens, const std::optional<Tensor>& cu_seqlens_k,
                           const std::optional<Tensor>& block_table, int64_t T, int64_t key_rows) {
  Sequences s{};
  s.B = cu_seqlens_q.dim() == 1 ? cu_seqlens_q.size(0) - 1 : 0;
  s.T = T;
  s.key_rows = key_rows;
  s.cu_seqlens_q = data_as<int32_t>(cu_seqlens_q, "cu_seqlens_q", DType::i32, {kAny});
  s.seq_lens = data_as<int32_t>(seq_lens, "seq_lens", DType::i32, {s.B});
  s.cu_seqlens_k = data_or_null<int32_t>(cu_seqlens_k, "cu_seqlens_k", DType::i32, {s.B + 1});
  s.block_table = data_or_null<int32_t>(block_table, "block_table", DType::i32, {s.B, kAny});
  s.max_blocks = block_table.has_value() ? block_table->size(1) : 0;
  static constexpr int32_t kNoPage = -1;  // an empty table has no data, and is a table all the same
  if (block_table.has_value() && s.block_table == nullptr) s.block_table = &kNoPage;
  return s;
}

// The table of glmx.ops.StoredWeight, [2, E, parts], with its format and the dtype of its scales as ops.h counts them.
inline StoredWeights stored_weights(const Tensor& table, const char* name, int64_t format, int64_t scale_dtype, int64_t E, int64_t parts) {
  GLMX_CHECK(format >= 0 && format <= static_cast<int64_t>(StoredFormat::fp8_blocks), name, ": unknown format of stored weights: ", format);
  const int64_t* addresses = data_as<int64_t>(table, name, DType::i64, {2, E, parts});
  return {addresses, static_cast<StoredFormat>(format), static_cast<DType>(scale_dtype)};
}

// A scratch buffer for one call, on the device of `like`.
Tensor workspace(const Tensor& like, DType dtype, int64_t elements);

}  // namespace glmx::bind

// GLMX_KERNELS(m) { m.impl(...); }: the functions that serve CPU and GPU tensors alike. torch says CUDA of AMD's cards too.
#define GLMX_KERNELS(m)                                                   \
  static void glmx_kernels(torch::stable::detail::StableLibrary&);        \
  STABLE_TORCH_LIBRARY_IMPL(glmx, CPU, on_cpu) { glmx_kernels(on_cpu); }  \
  STABLE_TORCH_LIBRARY_IMPL(glmx, CUDA, on_gpu) { glmx_kernels(on_gpu); } \
  static void glmx_kernels(torch::stable::detail::StableLibrary& m)
