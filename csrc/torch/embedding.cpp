// torch.ops.glmx.embedding, embedding_backward
#include "torch/bind.h"

namespace glmx::bind {
namespace {

void forward(Tensor y, const Tensor& ids, const Tensor& weight) {
  const Call call(weight, "weight");
  EmbeddingParams p{};
  p.device = call.device();
  p.dtype = model_dtype(weight, "weight");
  p.weight = data(weight, "weight", p.dtype, {kAny, kAny});
  p.V = weight.size(0);
  p.H = weight.size(1);
  p.ids = data_as<int64_t>(ids, "ids", DType::i64, {kAny});
  p.T = ids.size(0);
  p.y = data(y, "y", p.dtype, {p.T, p.H});
  run(embedding, p);
}

void backward(Tensor d_weight, const Tensor& ids, const Tensor& dy, bool accumulate) {
  const Call call(dy, "dy");
  EmbeddingBackwardParams p{};
  p.device = call.device();
  p.dtype = model_dtype(dy, "dy");
  p.ids = data_as<int64_t>(ids, "ids", DType::i64, {kAny});
  p.T = ids.size(0);
  p.dy = data(dy, "dy", p.dtype, {p.T, kAny});
  p.H = dy.size(1);
  p.d_weight = data_as<float>(d_weight, "d_weight", DType::f32, {kAny, p.H});
  p.V = d_weight.size(0);
  const Tensor offsets = workspace(dy, DType::i32, p.V + 1), order = workspace(dy, DType::i32, p.T);
  p.offsets = static_cast<int32_t*>(offsets.data_ptr());
  p.order = static_cast<int32_t*>(order.data_ptr());
  p.accumulate = accumulate;
  embedding_backward(p);
}

}  // namespace
}  // namespace glmx::bind

STABLE_TORCH_LIBRARY_FRAGMENT(glmx, m) {
  m.def("embedding(Tensor(a!) y, Tensor ids, Tensor weight) -> ()");
  m.def("embedding_backward(Tensor(a!) d_weight, Tensor ids, Tensor dy, bool accumulate) -> ()");
}
GLMX_KERNELS(m) {
  m.impl("embedding", TORCH_BOX(&glmx::bind::forward));
  m.impl("embedding_backward", TORCH_BOX(&glmx::bind::backward));
}
