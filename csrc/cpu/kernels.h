// The entry points of every CPU kernel, declared once for each ISA namespace. ops/<op>.cpp puts them into its table.
#pragma once
#include "cpu/lm_head_logprob.h"
#include "glmx/ops.h"

// Made of matrix products.
#define GLMX_PRODUCT_KERNELS                                 \
  void grouped_gemm(const GroupedGemmParams& p);             \
  void grouped_gemm_dgrad(const GroupedGemmDgradParams& p);  \
  void grouped_gemm_wgrad(const GroupedGemmWgradParams& p);  \
  void head_gemm(const HeadGemmParams& p);                   \
  void head_gemm_wgrad(const HeadGemmWgradParams& p);        \
  void attention(const AttentionParams& p);                  \
  void attention_backward(const AttentionBackwardParams& p); \
  void indexer_topk(const IndexerTopkParams& p);             \
  void sparse_mla(const SparseMlaParams& p);                 \
  void sparse_mla_backward(const SparseMlaBackwardParams& p);

#define GLMX_VECTOR_KERNELS                                        \
  GLMX_PRODUCT_KERNELS                                             \
  void route_topk(const RouteTopkParams& p);                       \
  void route_topk_backward(const RouteTopkBackwardParams& p);      \
  void grouped_gemm_bias_grad(const GroupedGemmBiasGradParams& p); \
  void moe_combine(const MoeCombineParams& p);                     \
  void moe_combine_backward(const MoeCombineBackwardParams& p);    \
  void indexer_kl(const IndexerKlParams& p);                       \
  void indexer_kl_backward(const IndexerKlBackwardParams& p);      \
  void sample(const SampleParams& p);                              \
  void mtp_verify(const MtpVerifyParams& p);                       \
  void rms_norm(const RmsNormParams& p);                           \
  void rms_norm_backward(const RmsNormBackwardParams& p);          \
  void add_rms_norm(const AddRmsNormParams& p);                    \
  void layer_norm(const LayerNormParams& p);                       \
  void layer_norm_backward(const LayerNormBackwardParams& p);      \
  void silu_mul(const SiluMulParams& p);                           \
  void silu_mul_backward(const SiluMulBackwardParams& p);          \
  void rope_cos_sin(const RopeCosSinParams& p);                    \
  void rope(const RopeParams& p);                                  \
  void embedding(const EmbeddingParams& p);                        \
  void embedding_backward(const EmbeddingBackwardParams& p);       \
  void sum_squares(const SumSquaresParams& p);                     \
  void adamw(const AdamwParams& p);                                \
  void lm_head_scan(const LmHeadScan& p);                          \
  void lm_head_finish(const LmHeadFinish& p);                      \
  void lm_head_d_logits(const LmHeadDlogits& p);                   \
  void lm_head_add(const LmHeadAdd& p);

namespace glmx::cpu::base {
GLMX_VECTOR_KERNELS
int64_t expert_plan(const ExpertPlanParams& p);  // scalar; the index of the first bad id, or -1
void cache_append(const CacheAppendParams& p);   // copies: the C library chooses its vectors
}  // namespace glmx::cpu::base
namespace glmx::cpu::avx2 {
GLMX_VECTOR_KERNELS
}
namespace glmx::cpu::avx512 {
GLMX_VECTOR_KERNELS
}
namespace glmx::cpu::avx512_bf16 {  // bf16 only
GLMX_PRODUCT_KERNELS
void indexer_kl(const IndexerKlParams& p);
void indexer_kl_backward(const IndexerKlBackwardParams& p);
}  // namespace glmx::cpu::avx512_bf16
namespace glmx::cpu::amx {  // bf16 only
GLMX_PRODUCT_KERNELS
}
