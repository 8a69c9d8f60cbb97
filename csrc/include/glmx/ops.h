// The contracts of every op: one POD Params struct and one function per op. No torch, no CUDA types.
//
// Common to all ops
//   Layout      every tensor is dense and row-major; a pointer carries its shape beside it; sizes are int64.
//   Dtypes      "model dtype" is fp32 or bf16 and is named by the `dtype` field; arithmetic inside is fp32.
//   Aliasing    outputs do not overlap inputs, unless the op says so. Null is allowed only where marked "or null".
//   Errors      the host function checks what can be checked from Params and throws glmx::Error before any work.
//   Denormals   flushed on input and output (FTZ + DAZ) in every op.
//   Exactness   the same input gives the same bits for every ISA, thread count and batch (DESIGN.md, X1, X2, X5).
//   Row sums    sixteen virtual lanes: element i goes to lane i % 16, lanes are folded 16 -> 8 -> 4 -> 2 -> 1 (lane j + lane j + half).
//   GEMM tree   per output element: for each block of 32 k (K zero-padded to 32),
//                 e = fused chain over even k from +0, o = fused chain over odd k from +0, C = C + (e + o), C from +0.
//               It is what one AMX bf16 tile step computes; the other ISAs follow it in fp32 FMA, or in pairs of links of a chain.
//   Device      `device` says where the pointers live (device.h); ops without that field run on the CPU alone. On a GPU the host does not
//               check the contents of index tensors. Every op has one tree for all backends, but for products of bf16: on a GPU their
//               sums are the tensor core's, sixteen k at a time in order.
//   Revision    kXxxRevision is raised by whoever changes an op's bits; tests/ops/golden.json holds the bits of each.
#pragma once
#include <cstdint>

#include "glmx/device.h"
#include "glmx/dtype.h"

namespace glmx {

// Sequences of the ops that have a key cache. Query rows are flat: sequence i owns rows [cu_seqlens_q[i], cu_seqlens_q[i + 1]), its last
// tokens; it has seq_lens[i] keys in all. So row r of sequence i sees its keys [0, seq_lens[i] - (cu_seqlens_q[i + 1] - 1 - r)).
// Keys lie in rows of a cache, either contiguous, key j in row cu_seqlens_k[i] + j, or in pages of kPageRows rows, key j in row
// block_table[i][j / kPageRows] * kPageRows + j % kPageRows. Exactly one of cu_seqlens_k and block_table is given. Pages past a sequence's
// keys are not looked at; neither are rows past its keys.
inline constexpr int64_t kPageRows = 64;
struct Sequences {
  const int32_t* cu_seqlens_q;  // [B + 1], cu_seqlens_q[0] == 0, ascending, cu_seqlens_q[B] == T
  const int32_t* seq_lens;      // [B], each at least the sequence's query rows
  const int32_t* cu_seqlens_k;  // [B + 1], ascending, room for seq_lens[i] rows each; or null
  const int32_t* block_table;   // [B, max_blocks], pages in [0, key_rows / kPageRows); or null
  int64_t B, T, max_blocks, key_rows;
};

// route_topk: sigmoid routing with a selection bias and groups.
//   s = sigmoid(logits); c = s + bias; groups outside the best topk_group (score: sum of the two largest c) count as -inf;
//   ids = the top_k largest c, descending, ties to the lower id (NaN is -inf, -0 is +0); w = s[ids];
//   norm_topk_prob: w = w / (sum of w in order + 1e-20); w = w * routed_scaling_factor.
inline constexpr int kRouteTopkRevision = 1;
struct RouteTopkParams {
  const float* logits;          // [T, E]
  const float* bias;            // [E]
  float* topk_weights;          // [T, K]
  int32_t* topk_ids;            // [T, K]
  int32_t* expert_counts;       // [E], tokens routed to each expert
  float* scores;                // [T, E] sigmoid(logits), or null
  int64_t T, E, K;              // 1 <= K <= E <= 512
  int64_t n_group, topk_group;  // E % n_group == 0, 1 <= topk_group <= n_group, K <= topk_group * (E / n_group)
  bool norm_topk_prob;
  float routed_scaling_factor;
  Device device = {};
};
void route_topk(const RouteTopkParams& p);

// Backward to the logits through the weights (and through the scores when d_scores is given).
struct RouteTopkBackwardParams {
  const float* d_topk_weights;  // [T, K] or null
  const float* d_scores;        // [T, E] or null
  const float* logits;          // [T, E]
  const int32_t* topk_ids;      // [T, K], each in [0, E) (else an error)
  float* d_logits;              // [T, E]
  int64_t T, E, K;
  bool norm_topk_prob;
  float routed_scaling_factor;
  Device device = {};
};
void route_topk_backward(const RouteTopkBackwardParams& p);

// expert_plan: the stable permutation that groups (token, k) pairs by expert. Ids of -1 are skipped.
inline constexpr int kExpertPlanRevision = 1;
struct ExpertPlanParams {
  const int32_t* topk_ids;  // [T, K], each -1 or 0 <= id < E (else an error)
  int32_t* expert_offsets;  // [E + 1]: rows of expert e are [offsets[e], offsets[e+1])
  int32_t* row_token;       // [T * K]: the token of each row; -1 past offsets[E]
  int32_t* inverse;         // [T, K]: the row of each pair; -1 where skipped
  int64_t T, K, E;          // T * K < 2^31 - 1
  Device device = {};
};
void expert_plan(const ExpertPlanParams& p);

// Weights [E, N, K] as a checkpoint stores them: E * parts matrices [N / parts, K], dense and row-major, wherever they lie.
//   bf16        values bf16 [rows, K]
//   int8        values int8 [rows, K], scale [rows]
//   int4        values [rows, ceil(K / 8)] words of 32 bits: eight in a word, the first in its lowest bits, each stored as value + 8;
//               scale [rows, ceil(K / 128)], one for 128 columns
//   fp8         values e4m3 [rows, K], scale [rows]
//   fp8_blocks  values e4m3 [rows, K], scale [ceil(rows / 128), ceil(K / 128)]
// int4 and fp8_blocks stand for the weight bf16(value * scale), the product in fp32: their bits are those of the dense bf16 weight. int8
// and fp8 stand for the weight `value`, exact in bf16; the fp32 sum is multiplied once by the scale of its row, before bias, silu_mul and
// rounding. Padding behind K is multiplied by the last scale too: an infinite scale makes NaN of it.
enum class StoredFormat : int32_t { bf16 = 0, int8 = 1, int4 = 2, fp8 = 3, fp8_blocks = 4 };
inline constexpr int64_t kScaleGroup = 128;
struct StoredWeights {
  const int64_t* table;  // [2, E, parts]: the addresses of values, then of scales; or null: the weights are dense. parts is 2 with silu_mul
  StoredFormat format;
  DType scale_dtype;  // fp32 or bf16
};

// grouped_gemm: out[r, :] = x[token(r), :] @ w[e(r)]^T (+ bias[e(r)]), rows grouped by expert. E = 1 is the dense linear.
//   token(r) = row_token[r] with a gather, else r. Rows past expert_offsets[E] are written as zeros.
//   silu_mul: w holds gate rows [0, N/2) then up rows [N/2, N); out [R, N/2] = silu(gate) * up from the fp32 accumulators, one rounding;
//   preact (or null) then receives the pre-activations [R, N] rounded to the model dtype, for the backward.
inline constexpr int kGroupedGemmRevision = 1;
struct GroupedGemmParams {
  const void* x;                  // [M, K] dtype
  const void* w;                  // [E, N, K] dtype, or null with `stored`
  StoredWeights stored;           // needs dtype bf16 and no preact
  const void* bias;               // [E, N] dtype, or null
  const int32_t* expert_offsets;  // [E + 1], ascending, offsets[0] == 0, offsets[E] <= R; or null with E == 1: all rows are its
  const int32_t* row_token;       // [R] in [0, M), or null (then R == M); entries past offsets[E] are not read
  void* out;                      // [R, N] out_dtype, or [R, N/2] with silu_mul
  void* preact;                   // [R, N] dtype, or null; only with silu_mul
  int64_t M, R, N, K, E;
  DType dtype, out_dtype;  // each fp32 or bf16; dtype fp32 needs out_dtype fp32
  bool silu_mul;
  Device device = {};
};
void grouped_gemm(const GroupedGemmParams& p);

// grouped_gemm_dgrad: dx[r, :] = dy[r, :] @ w[e(r)], reduced over N by the GEMM tree. Rows past offsets[E] are zeros.
struct GroupedGemmDgradParams {
  const void* dy;                 // [R, N] dtype
  const void* w;                  // [E, N, K] dtype
  const int32_t* expert_offsets;  // [E + 1]
  void* dx;                       // [R, K] out_dtype
  int64_t R, N, K, E;
  DType dtype, out_dtype;
  Device device = {};
};
void grouped_gemm_dgrad(const GroupedGemmDgradParams& p);

// grouped_gemm_wgrad: dw[e] = dy[rows of e]^T @ x[token(rows of e)], reduced over the expert's rows by the GEMM tree.
//   accumulate: dw = dw + result (fp32 only); experts with no rows are left alone. Without it, they write zeros.
struct GroupedGemmWgradParams {
  const void* dy;                 // [R, N] dtype
  const void* x;                  // [M, K] dtype
  const int32_t* expert_offsets;  // [E + 1]
  const int32_t* row_token;       // [R] or null
  void* dw;                       // [E, N, K] out_dtype
  int64_t M, R, N, K, E;
  DType dtype, out_dtype;
  bool accumulate;  // needs out_dtype fp32
  Device device = {};
};
void grouped_gemm_wgrad(const GroupedGemmWgradParams& p);

// grouped_gemm_bias_grad: d_bias[e] = the sum of dy over the rows of e: blocks of 64 rows from its first row, rows and blocks in order.
struct GroupedGemmBiasGradParams {
  const void* dy;                 // [R, N] dtype
  const int32_t* expert_offsets;  // [E + 1]
  float* d_bias;                  // [E, N]
  int64_t R, N, E;
  DType dtype;
  bool accumulate;  // d_bias = d_bias + result
  Device device = {};
};
void grouped_gemm_bias_grad(const GroupedGemmBiasGradParams& p);

// head_gemm: y[t, a, :] = x[t, a, :] @ w[a]^T with w [A, N, K], or x[t, a, :] @ w[a] with w [A, K, N] when `transposed`. GEMM tree over K.
//   x, w and y are views: the last dimension is dense, the others have strides in elements, so that a slice of every head's row, and rows
//   of a larger weight, need no copy. The gradient of x is head_gemm on dy with the other `transposed`.
inline constexpr int kHeadGemmRevision = 1;
struct HeadGemmParams {
  const void* x;  // [T, A, K] dtype: element (t, a, k) at t * x_token + a * x_head + k
  const void* w;  // [A, N, K] dtype: (a, n, k) at a * w_head + n * w_row + k; transposed [A, K, N]: (a, k, n) at a * w_head + k * w_row + n
  void* y;        // [T, A, N] out_dtype: (t, a, n) at t * y_token + a * y_head + n; elements do not overlap
  int64_t T, A, N, K;
  int64_t x_token, x_head, w_head, w_row, y_token, y_head;
  bool transposed;
  DType dtype, out_dtype;  // each fp32 or bf16; dtype fp32 needs out_dtype fp32
};
void head_gemm(const HeadGemmParams& p);

// head_gemm_wgrad: dw[a] = dy[:, a, :]^T @ x[:, a, :], summed over the tokens by the GEMM tree. For `transposed` weights, x and dy swap
// places.
struct HeadGemmWgradParams {
  const void* dy;  // [T, A, N] dtype: (t, a, n) at t * dy_token + a * dy_head + n
  const void* x;   // [T, A, K] dtype: (t, a, k) at t * x_token + a * x_head + k
  void* dw;        // [A, N, K] out_dtype: (a, n, k) at a * dw_head + n * dw_row + k; elements do not overlap
  int64_t T, A, N, K;
  int64_t dy_token, dy_head, x_token, x_head, dw_head, dw_row;
  DType dtype, out_dtype;
  bool accumulate;  // dw = dw + result; needs out_dtype fp32
};
void head_gemm_wgrad(const HeadGemmWgradParams& p);

// moe_combine: out[t, :] = sum over k in order of topk_weights[t, k] * rows[inverse[t, k], :], fp32 (fma from +0), one rounding.
inline constexpr int kMoeCombineRevision = 1;
struct MoeCombineParams {
  const void* rows;           // [R, H] dtype
  const float* topk_weights;  // [T, K], or null: every weight is 1 (the backward of a row gather)
  const int32_t* inverse;     // [T, K]: a row in [0, R), or -1: adds nothing
  void* out;                  // [T, H] dtype
  int64_t T, K, R, H;
  DType dtype;
  Device device = {};
};
void moe_combine(const MoeCombineParams& p);

struct MoeCombineBackwardParams {
  const void* d_out;          // [T, H] dtype
  const void* rows;           // [R, H] dtype
  const float* topk_weights;  // [T, K], or null
  const int32_t* inverse;     // [T, K]: each row at most once (else an error)
  void* d_rows;               // [R, H] dtype; rows that no pair names are zeros
  float* d_topk_weights;      // [T, K], or null: dot(d_out[t], rows[inverse[t, k]]), lanes as in "row sums"; 0 where inverse is -1
  int32_t* pair_of_row;       // workspace [R]
  int64_t T, K, R, H;
  DType dtype;
  Device device = {};
};
void moe_combine_backward(const MoeCombineBackwardParams& p);

// moe_mlp: the routed experts of a MoE layer in one call. Its bits are those of the ops that it is made of, one after the other:
//   plan = expert_plan(topk_ids); h = grouped_gemm(x by row_token, gate_up_proj, silu_mul), rounded to dtype;
//   rows = grouped_gemm(h, down_proj), rounded to dtype; out = moe_combine(rows, topk_weights, inverse).
// No backward of its own: the workspaces keep no pre-activations. Its revision is raised with theirs.
inline constexpr int kMoeMlpRevision = 1;
struct MoeMlpParams {
  const void* x;                              // [T, H] dtype
  const float* topk_weights;                  // [T, K]
  const int32_t* topk_ids;                    // [T, K], each -1 (adds nothing) or 0 <= id < E (else an error)
  const void* gate_up_proj;                   // [E, 2 * I, H] dtype: gate rows, then up rows; or null with gate_up_stored
  const void* down_proj;                      // [E, H, I] dtype, or null with down_stored
  StoredWeights gate_up_stored, down_stored;  // both or none; need dtype bf16
  void* out;                                  // [T, H] dtype
  int32_t* plan;                              // workspace [E + 1 + 2 * T * K]: expert_offsets, row_token, inverse
  void* h;                                    // workspace [T * K, I] dtype
  void* rows;                                 // workspace [T * K, H] dtype
  int64_t T, K, E, H, I;                      // K >= 1, T * K < 2^31 - 1
  DType dtype;
  Device device = {};
};
void moe_mlp(const MoeMlpParams& p);

// Attention: what attention and sparse_mla compute for a query row and head over a list of n keys (its own, in order), in model dtype T:
//   for each block of kBlockKeys keys of the list, in order:
//     s_j = (GEMM tree over Dk of q . k_j) * scale                                         fp32
//     m' = max(m, max_j s_j), m from -inf; alpha = e^(m - m'), p_j = e^(s_j - m')          m' = -inf counts as 0 in the differences
//     l = fma(l, alpha, sum of p_j in sixteen lanes)                                       key j of a block in lane j % 16, folded
//     O = O * alpha; for each 32 keys of the block: O = O + (chain over even j of p~_j v_j + chain over odd j)   p~: p rounded to T
//   out = (O + 0) / l, rounded once; lse = m + log(l), formed in fp64. No key: out 0, lse +inf. All s_j = -inf: out NaN, lse -inf.
// Keys past the n-th are not read: a NaN in them changes nothing. So whole prefill, chunks, decode and verification agree in bits, and the
// blocks are what AMX tile steps compute. Backward, with p = e^(s - lse):
//   delta = d_out . out in sixteen lanes; p~_j = p_j rounded to T
//   ds_j = p_j * (GEMM tree over Dv of d_out . v_j - delta) * scale, rounded to T
//   d_q = (GEMM tree over the list of ds_j k_j, blocks of 32 keys in order) + 0, rounded once; d_k and d_v: see each op.
inline constexpr int64_t kBlockKeys = 64;  // keys of a block, counted from the start of the list: part of the bits

// attention: causal attention of each sequence's query rows to its own keys: the list of a row is every key that it sees, in order.
//   Query head a uses kv head a / (A / G).
inline constexpr int kAttentionRevision = 1;
struct AttentionParams {
  const void* q;  // [T, A, Dk] dtype
  const void* k;  // [key_rows, G, Dk] dtype
  const void* v;  // [key_rows, G, Dv] dtype; or null: the first Dv values of k (absorbed MLA), then Dv <= Dk
  void* out;      // [T, A, Dv] dtype
  float* lse;     // [T, A], or null
  Sequences sequences;
  int64_t A, G, Dk, Dv;  // A % G == 0
  float scale;
  DType dtype;
};
void attention(const AttentionParams& p);

// Contiguous keys only.
//   d_k[j] = the GEMM tree over the query rows of the sequence, A / G heads of each token in order, of ds q; d_v likewise of
//   p~ d_out. Blocks of 32 rows count from the first query row; rows that do not see key j count as zeros, and blocks in which no row
//   sees any key of j's block of kBlockKeys are left out. Without v, d_k = d_k + d_v in fp32. + 0, one rounding.
struct AttentionBackwardParams {
  const void* d_out;  // [T, A, Dv] dtype
  const void* q;      // [T, A, Dk] dtype
  const void* k;      // [key_rows, G, Dk] dtype
  const void* v;      // [key_rows, G, Dv] dtype, or null
  const void* out;    // [T, A, Dv] dtype, of the forward
  const float* lse;   // [T, A], of the forward
  void* d_q;          // [T, A, Dk] dtype
  void* d_k;          // [key_rows, G, Dk] dtype; rows that hold no key get zeros
  void* d_v;          // [key_rows, G, Dv] dtype; null when v is
  float* delta;       // workspace [T, A]
  Sequences sequences;
  int64_t A, G, Dk, Dv;
  float scale;
  DType dtype;
};
void attention_backward(const AttentionBackwardParams& p);

// indexer_topk: the keys that DSA's lightning indexer picks for each query row: of the n keys that it sees the min(top_k, n) best, as
//   positions in its sequence, ascending; then -1. n <= top_k: every key, and no score is computed. Else by the scores
//     I_s = sum over the heads h, in order, by fp32 fma from +0, of weights[h] * relu(GEMM tree over Di of q[h] . k[s])    relu(NaN) = NaN
//   in one total order: score (-0 as +0, NaN as -inf) descending, then position ascending. A row scores no key that it does not see.
inline constexpr int kIndexerTopkRevision = 1;
struct IndexerTopkParams {
  const void* q;          // [T, Hi, Di] dtype
  const float* weights;   // [T, Hi], any sign; Hi^-0.5 * Di^-0.5 is in them
  const void* k;          // [key_rows, Di] dtype
  int32_t* topk_indices;  // [T, top_k]
  Sequences sequences;
  int64_t Hi, Di, top_k;
  int64_t range_keys;  // keys of a work item: a multiple of kPageRows, or 0: what suits the sizes and threads. Changes no bits
  DType dtype;
};
void indexer_topk(const IndexerTopkParams& p);

// sparse_mla: absorbed MLA over listed keys: all heads of query token t attend to the keys topk_indices[t] of its sequence, in that order;
//   the values are the first Dv of a key's Dk values. A list of all keys that a row sees gives the bits of attention.
inline constexpr int kSparseMlaRevision = 1;
struct SparseMlaParams {
  const void* q;                // [T, A, Dk] dtype
  const void* kv;               // [key_rows, Dk] dtype
  const int32_t* topk_indices;  // [T, top_k] positions in the sequence, ascending, below what the row sees; then -1
  void* out;                    // [T, A, Dv] dtype
  float* lse;                   // [T, A], or null
  Sequences sequences;
  int64_t A, Dk, Dv, top_k;  // Dv <= Dk
  float scale;
  DType dtype;
};
void sparse_mla(const SparseMlaParams& p);

// Contiguous keys only.
//   d_kv[j], from +0, over the query tokens that list key j, in order: + (GEMM tree over the heads of ds q), then, in its first Dv values,
//   + (GEMM tree over the heads of p~ d_out); each tree adds its blocks of 32 heads to the sum one by one. + 0, one rounding.
struct SparseMlaBackwardParams {
  const void* d_out;            // [T, A, Dv] dtype
  const void* q;                // [T, A, Dk] dtype
  const void* kv;               // [key_rows, Dk] dtype
  const int32_t* topk_indices;  // [T, top_k]
  const void* out;              // [T, A, Dv] dtype, of the forward
  const float* lse;             // [T, A], of the forward
  void* d_q;                    // [T, A, Dk] dtype
  void* d_kv;                   // [key_rows, Dk] dtype; rows that no token lists get zeros
  float* delta;                 // workspace [T, A]
  float* sums;                  // workspace [key_rows, Dk]
  float* scores;                // workspace [2, score_tokens, ceil(top_k / kBlockKeys), A, kBlockKeys]
  Sequences sequences;
  int64_t A, Dk, Dv, top_k;
  int64_t score_tokens;  // tokens at a time, at least 1: sparse_mla_score_tokens(p). Changes no bits
  float scale;
  DType dtype;
};
int64_t sparse_mla_score_tokens(const SparseMlaBackwardParams& p);
void sparse_mla_backward(const SparseMlaBackwardParams& p);

// indexer_kl: per query token, the KL divergence of the main attention, averaged over its heads, from the softmax of the index scores.
//   The list of token t is topk_indices[t], or every key that it sees, in order: a list of all keys gives the bits of no lists.
//     p_s = (sum over the heads in order, from +0, of e^((GEMM tree of q . kv_s) * scale - lse[t, a])) / A            fp32
//     I_s = chain of fma over the index heads in order, from +0, of w[t, h] * relu(GEMM tree of index_q . index_k_s)  NaN stays NaN
//     for each block of kBlockKeys places of the list, in order:
//       m' = max(m, max_s I_s), m from -inf; l = fma(l, e^(m - m'), sum of e^(I_s - m'))      m as in "Attention"; l in fp64
//       mass = mass + sum of p_s, E = E + sum of p_s * (log p_s - I_s)                        a p_s of 0 adds nothing to E; both in fp64
//     kl = fma(index_lse, mass, E), index_lse = m + log(l), fp64, rounded once. No key: 0.
//   The sums of a block are fp32 in sixteen lanes, place j in lane j % 16, folded. lse is that of the main attention over the same keys,
//   so the p of a token sum to 1 up to rounding; they are not divided by their sum.
inline constexpr int kIndexerKlRevision = 1;
struct IndexerKlParams {
  const void* index_q;          // [T, Hi, Di] dtype
  const float* index_weights;   // [T, Hi]
  const void* index_k;          // [key_rows, Di] dtype
  const void* q;                // [T, A, Dk] dtype
  const void* kv;               // [key_rows, Dk] dtype
  const float* lse;             // [T, A]
  const int32_t* topk_indices;  // [T, top_k] as in sparse_mla, or null
  float* kl;                    // [T]
  float* index_lse;             // [T], or null; the backward needs both
  float* mass;                  // [T], or null
  Sequences sequences;          // contiguous keys only
  int64_t Hi, Di, A, Dk, top_k;
  float scale;
  DType dtype;
};
void indexer_kl(const IndexerKlParams& p);

// To the index scores' inputs alone: q, kv and lse are constants. Scores and p are recomputed.
//     dI_s = (e^(I_s - index_lse) * mass - p_s) * d_kl, the first two steps one fma; g_hs = dI_s * w[t, h] where relu > 0, rounded to dtype
//   d_index_weights[t, h] = fma over the list of dI_s and relu_hs, in sixteen lanes, folded at its end
//   d_index_q = (GEMM tree over the list of g k_s, blocks of 32 places in order) + 0, rounded once
//   d_index_k[s], from +0, over the query tokens that list key s, in order: + (GEMM tree over the heads of g index_q), its blocks of 32
//   heads one by one. + 0, one rounding.
struct IndexerKlBackwardParams {
  const float* d_kl;            // [T]
  const void* index_q;          // [T, Hi, Di] dtype
  const float* index_weights;   // [T, Hi]
  const void* index_k;          // [key_rows, Di] dtype
  const void* q;                // [T, A, Dk] dtype
  const void* kv;               // [key_rows, Dk] dtype
  const float* lse;             // [T, A]
  const int32_t* topk_indices;  // [T, top_k], or null
  const float* index_lse;       // [T], of the forward
  const float* mass;            // [T], of the forward
  void* d_index_q;              // [T, Hi, Di] dtype
  float* d_index_weights;       // [T, Hi]
  void* d_index_k;              // [key_rows, Di] dtype; rows that no token lists get zeros
  float* sums;                  // workspace [key_rows, Di]
  float* scores;                // workspace [score_tokens, score_blocks, Hi, kBlockKeys]
  Sequences sequences;
  int64_t Hi, Di, A, Dk, top_k;
  int64_t score_tokens;  // tokens at a time, at least 1: indexer_kl_score_tokens(p). Changes no bits
  int64_t score_blocks;  // blocks of the longest list, or more: indexer_kl_score_blocks(p)
  float scale;
  DType dtype;
};
int64_t indexer_kl_score_blocks(const IndexerKlBackwardParams& p);
int64_t indexer_kl_score_tokens(const IndexerKlBackwardParams& p);  // reads score_blocks
void indexer_kl_backward(const IndexerKlBackwardParams& p);

// sample: one token from each row of logits, by the row's own rules.
//   1. Bias: each listed (token, value) is added to its logit, in order.
//   2. Penalties, once for each token of the row's history: x = x > 0 ? x / repetition : x * repetition; then, if it was generated n > 0
//      times, x = (x - frequency * n) - presence. Single fp32 operations.
//   3. Temperature 0, or top_k 1: the largest logit, ties to the lower id, and that is all. Order of logits: NaN as -inf, -0 as +0.
//   4. z = (x - largest) * (1 / temperature), fp32. A token's mass is e^z (the polynomial of vec_math.inl), rounded to a whole multiple of
//      2^-42, even on ties; none below z = -80. An infinite largest logit: the tokens that have it weigh 1, the others nothing.
//   5. min_p keeps z >= fp32(log(min_p)); top_k the first top_k of what is left, in the order (logit descending, id ascending), 0 all;
//      top_p of those the shortest prefix whose mass reaches fp64(mass of all those) * top_p, 1 all. At least one token stays.
//   6. The token is the first, in the order of ids, at which the running sum of the kept masses exceeds floor(coin * sum / 2^24).
//   The coin is the top 24 bits of the first word of Philox4x32-10: key = the seed's low and high 32 bits, counter = (the position's low
//   and high 32 bits, draw, 0). Draws in use: see kDraw. Masses add up as integers, so no order of sums is part of the rule.
inline constexpr int kSampleRevision = 1;
inline constexpr int64_t kSampleVocabulary = int64_t{1} << 20;  // largest V: sums of masses stay below 2^62
enum Draw : int64_t {
  kDrawTarget = 0,    // a token of the model itself: plain sampling, sampled verification, the token after the last accepted draft
  kDrawAccept = 1,    // mtp_verify: is the draft of this position accepted?
  kDrawResidual = 2,  // mtp_verify: the token in place of a refused draft
  kDrawDraft = 3,     // what a drafter draws its own tokens with
};

// One number per row each, and the row's earlier tokens. Rows may share parts of the flat lists: a draft's row has the history of the row
// before it and one token more.
struct SampleRules {
  const int64_t* seeds;             // [R]
  const int64_t* positions;         // [R]: the index in its sequence of the token that is drawn
  const float* temperature;         // [R], 0 or in [1e-30, 1e30]
  const int64_t* top_k;             // [R], >= 0
  const float* top_p;               // [R], in (0, 1]
  const float* min_p;               // [R], in [0, 1]
  const int64_t* history;           // [R, 3]: begin, first generated, end, of a span of token_ids; or null, as are then the next four
  const int64_t* token_ids;         // [tokens], each in [0, V)
  const float* repetition_penalty;  // [R], > 0, finite
  const float* presence_penalty;    // [R], finite
  const float* frequency_penalty;   // [R], finite
  const int64_t* bias_spans;        // [R, 2]: begin and end of a span of bias_ids; or null, as are then the next two
  const int64_t* bias_ids;          // [biases], each in [0, V)
  const float* bias_values;         // [biases], no NaN
  int64_t tokens, biases;
};
struct SampleParams {
  const float* logits;  // [R, V]
  int64_t* ids;         // [R]
  SampleRules rules;
  int64_t R, V;  // 1 <= V <= kSampleVocabulary
  int64_t draw;  // in [0, 2^32)
};
void sample(const SampleParams& p);

// mtp_verify: of each sequence's chain of drafts, those that the model accepts, and one token of its own behind them.
//   Row j of a sequence holds the logits that judge draft j, rules and all; a draft of -1 ends the chain. Rows are taken in order until one
//   gives another token than its draft; rows behind it are not read.
//   greedy     the row's token is that of sample at temperature 0
//   sample     it is that of sample, draw kDrawTarget: the tokens are those of plain sampling under the same seed, whatever the drafts
//   rejection  with P the masses of the row's kept tokens and S their sum, in units of the largest, and q the draft's own distribution
//              (NaN and negative count as 0; without draft_probs 1 for the draft and 0 else): the draft is accepted if
//              u * q(draft) * S < P(draft), fp64, from the left, u = coin(kDrawAccept) / 2^24. So a draft without mass never is.
//              A refused draft is replaced by the token at coin(kDrawResidual) of the masses max(0, P - q * S), fp64, rounded to whole
//              multiples of 2^-42; of P if all those are 0. Where no draft is left the row's token is that of sample, draw kDrawTarget.
//              If drafts are drawn from q with coins that are none of these, tokens are distributed as those of plain sampling.
inline constexpr int kMtpVerifyRevision = 1;
enum class VerifyMode : int64_t { greedy = 0, sample = 1, rejection = 2 };
// R = B * (K + 1) rows, K + 1 of each sequence; or as many as row_offsets say, with drafts and their probs by rows too, of which the last
// one of a sequence has none.
struct MtpVerifyParams {
  const int64_t* draft_ids;    // [B, K], each in [0, V), or -1: no draft here, and those behind it do not count
  const float* logits;         // [B, K + 1, V]
  const float* draft_probs;    // [B, K, V], or null; with rejection only
  const int32_t* row_offsets;  // [B + 1] from 0 to R, ascending: the rows of each sequence, at least one; or null: K + 1 of each
  int64_t* tokens;             // [B, K + 1]: accepted drafts, the model's own token, then -1
  int64_t* accepted;           // [B]: how many drafts
  int64_t* packed_ids;         // [R]: the tokens of all sequences one behind the other, then -1
  int32_t* packed_offsets;     // [B + 1]: where those of each sequence begin and end
  SampleRules rules;           // R rows
  int64_t B, K, R, V;          // R < 2^31; K is 0 with row_offsets
  VerifyMode mode;
};
void mtp_verify(const MtpVerifyParams& p);

// rms_norm: y = weight * round(x * rsqrt(mean(x^2) + eps)), rounded to dtype before and after the weight (Hugging Face order).
//   1 / sqrt is computed as an exact square root and an exact division.
inline constexpr int kRmsNormRevision = 1;
struct RmsNormParams {
  const void* x;       // [T, H] dtype
  const void* weight;  // [H] dtype
  void* y;             // [T, H] dtype
  float* rstd;         // [T], or null; the backward needs it
  int64_t T, H;
  float eps;
  DType dtype;
  Device device = {};
};
void rms_norm(const RmsNormParams& p);

struct RmsNormBackwardParams {
  const void* dy;      // [T, H] dtype
  const void* x;       // [T, H] dtype
  const void* weight;  // [H] dtype
  const float* rstd;   // [T]
  void* dx;            // [T, H] dtype
  float* d_weight;     // [H]; summed over tokens in blocks of 64 rows, blocks in order
  float* partial;      // workspace [ceil(T / 64), H]
  int64_t T, H;
  bool accumulate;  // d_weight = d_weight + result
  DType dtype;
  Device device = {};
};
void rms_norm_backward(const RmsNormBackwardParams& p);

// add_rms_norm: residual_out = round(residual + x); y = rms_norm(residual_out). Its backward is rms_norm's plus an add.
inline constexpr int kAddRmsNormRevision = 1;
struct AddRmsNormParams {
  const void* x;         // [T, H] dtype
  const void* residual;  // [T, H] dtype
  const void* weight;    // [H] dtype
  void* y;               // [T, H] dtype
  void* residual_out;    // [T, H] dtype; may be `residual`
  float* rstd;           // [T], or null
  int64_t T, H;
  float eps;
  DType dtype;
  Device device = {};
};
void add_rms_norm(const AddRmsNormParams& p);

// layer_norm: y = n * weight + bias, n = (x - mean) * (1 / sqrt(var + eps)), var = mean((x - mean)^2): two passes in fp32, one rounding.
//   n * weight + bias is one fma. 1 / sqrt is computed as an exact square root and an exact division.
inline constexpr int kLayerNormRevision = 1;
struct LayerNormParams {
  const void* x;       // [T, H] dtype
  const void* weight;  // [H] dtype
  const void* bias;    // [H] dtype
  void* y;             // [T, H] dtype
  float* mean;         // [T], or null; the backward needs both
  float* rstd;         // [T], or null
  int64_t T, H;
  float eps;
  DType dtype;
  Device device = {};
};
void layer_norm(const LayerNormParams& p);

struct LayerNormBackwardParams {
  const void* dy;      // [T, H] dtype
  const void* x;       // [T, H] dtype
  const void* weight;  // [H] dtype
  const float* mean;   // [T]
  const float* rstd;   // [T]
  void* dx;            // [T, H] dtype
  float* d_weight;     // [H]; both are summed over tokens in blocks of 64 rows, blocks in order
  float* d_bias;       // [H]
  float* partial;      // workspace [ceil(T / 64), 2, H]
  int64_t T, H;
  bool accumulate_weight;  // d_weight = d_weight + result
  bool accumulate_bias;    // d_bias = d_bias + result
  DType dtype;
  Device device = {};
};
void layer_norm_backward(const LayerNormBackwardParams& p);

// silu_mul: y[t, i] = silu(x[t, i]) * x[t, I + i] in fp32, one rounding.
inline constexpr int kSiluMulRevision = 1;
struct SiluMulParams {
  const void* x;  // [T, 2 * I] dtype: gate, then up
  void* y;        // [T, I] dtype
  int64_t T, I;
  DType dtype;
  Device device = {};
};
void silu_mul(const SiluMulParams& p);

struct SiluMulBackwardParams {
  const void* dy;  // [T, I] dtype
  const void* x;   // [T, 2 * I] dtype
  void* dx;        // [T, 2 * I] dtype
  int64_t T, I;
  DType dtype;
  Device device = {};
};
void silu_mul_backward(const SiluMulBackwardParams& p);

// rope: rotate the first 2 * half dims of each head. Angles: position * theta^(-i / half), as pairs of fp64 up to the reduction,
//   so that cos and sin are the exact values rounded once (but for near-ties) at every position.
//   cos and sin are rounded to dtype, then each product and the sum are rounded to dtype (Hugging Face order).
//   interleaved: pairs (2i, 2i + 1), else (i, i + half). inverse: rotate by the negative angle (the backward).
inline constexpr int kRopeRevision = 1;
struct RopeCosSinParams {
  const int64_t* positions;  // [T], each in [0, 2^31)
  float* cos;                // [T, half]
  float* sin;                // [T, half]
  int64_t T, half;
  double theta;  // in [1, 1e30]
  Device device = {};
};
void rope_cos_sin(const RopeCosSinParams& p);

struct RopeParams {
  const void* x;     // [T, A, D] dtype
  const float* cos;  // [T, half]
  const float* sin;  // [T, half]
  void* y;           // [T, A, D] dtype; may be x
  int64_t T, A, D, half;
  bool interleaved, inverse;
  DType dtype;
  Device device = {};
};
void rope(const RopeParams& p);

// embedding: y[t, :] = weight[ids[t], :], bits unchanged (denormals too: it is a copy). Backward: d_weight[v, :] = fp32 sum over the tokens
// with id v, in token order.
inline constexpr int kEmbeddingRevision = 1;
struct EmbeddingParams {
  const int64_t* ids;  // [T], each in [0, V) (else an error)
  const void* weight;  // [V, H] dtype
  void* y;             // [T, H] dtype
  int64_t T, V, H;
  DType dtype;
  Device device = {};
};
void embedding(const EmbeddingParams& p);

struct EmbeddingBackwardParams {
  const int64_t* ids;  // [T]
  const void* dy;      // [T, H] dtype
  float* d_weight;     // [V, H]
  int32_t* offsets;    // workspace [V + 1]
  int32_t* order;      // workspace [T]
  int64_t T, V, H;     // T < 2^31 - 1
  bool accumulate;     // d_weight = d_weight + sum; else rows that no token names are zeros
  DType dtype;
  Device device = {};
};
void embedding_backward(const EmbeddingBackwardParams& p);

// cache_append: cache[slot_mapping[t], column .. column + W) = rows[t], bits unchanged (denormals too: it is a copy). Where two tokens name
// one slot, the later one stays.
inline constexpr int kCacheAppendRevision = 1;
struct CacheAppendParams {
  const void* rows;                          // [T, W] dtype
  const int64_t* slot_mapping;               // [T], each a row of the cache in [0, cache_rows), or -1: skipped
  void* cache;                               // [cache_rows, stride] dtype; what is not named stays as it is
  int64_t T, W, cache_rows, stride, column;  // 0 <= column, column + W <= stride
  DType dtype;
};
void cache_append(const CacheAppendParams& p);

// lm_head_logprob: z = (hidden @ weight^T) in fp32 * (1 / temperature); lse = log sum exp z; logprob = z[id] - lse.
//   The vocabulary is walked in chunks of kLmHeadChunk in order, with one online maximum (fp32) and sum (fp32 lanes within a chunk, fp64
//   across chunks) per token; a [T, V] buffer never exists. The last two differences are fp64 with one rounding each. Infinite logits give
//   NaN. top: the top_n largest z - lse, descending, ties to the lower id (NaN is -inf, -0 is +0).
inline constexpr int kLmHeadLogprobRevision = 1;
inline constexpr int64_t kLmHeadChunk = 1024;       // columns of W per chunk: part of the bits
inline constexpr int64_t kLmHeadTokenBlock = 1024;  // tokens per block of the backward: part of the bits of d_weight
struct LmHeadLogprobParams {
  const void* hidden;      // [T, H] dtype
  const void* weight;      // [V, H] dtype
  const int64_t* ids;      // [T] in [0, V), or -1: ignored, logprob 0 (lse and top are those of its row all the same)
  float* logprob;          // [T]
  float* lse;              // [T]
  int32_t* top_ids;        // [T, top_n]; not read or written when top_n is 0
  float* top_logprobs;     // [T, top_n]; not read or written when top_n is 0
  void* workspace;         // lm_head_logprob_workspace(p) bytes, aligned to 8
  int64_t T, V, H, top_n;  // 0 <= top_n <= V < 2^31
  float temperature;       // > 0
  DType dtype;
  Device device = {};
};
int64_t lm_head_logprob_workspace(const LmHeadLogprobParams& p);
void lm_head_logprob(const LmHeadLogprobParams& p);

// d_z[t, v] = d_logprob[t] * (1[v == id] - p) + d_lse[t] * p, times 1 / temperature, rounded to dtype; then dgrad and wgrad.
//   Tokens with neither a d_logprob (id -1 has none) nor a d_lse are left out: they cost nothing and change nobody's bits.
//   d_hidden: dgrad of each chunk (GEMM tree over its columns), chunks added in order, fp32.
//   d_weight: wgrad of each block of kLmHeadTokenBlock remaining tokens, blocks added in order.
struct LmHeadLogprobBackwardParams {
  const float* d_logprob;  // [T]
  const float* d_lse;      // [T], or null
  const void* hidden;      // [T, H] dtype
  const void* weight;      // [V, H] dtype
  const int64_t* ids;      // [T]
  const float* lse;        // [T] from the forward
  float* d_hidden;         // [T, H], overwritten; or null
  float* d_weight;         // [V, H], or null
  void* workspace;         // lm_head_logprob_backward_workspace(p) bytes, aligned to 8
  int64_t T, V, H;
  float temperature;
  bool accumulate;  // d_weight = d_weight + result
  DType dtype;
  Device device = {};
};
int64_t lm_head_logprob_backward_workspace(const LmHeadLogprobBackwardParams& p);
void lm_head_logprob_backward(const LmHeadLogprobBackwardParams& p);

// sum_squares: the sum of x_i^2 in fp64: chunks of 4096 elements, sixteen lanes each, folded, chunks added in order.
//   The square of an fp32 is exact in fp64, so a lane step is rounded once, with or without fma.
inline constexpr int kSumSquaresRevision = 1;
inline constexpr int64_t kSumSquaresChunk = 4096;  // elements; part of the bits
struct SumSquaresParams {
  const void* x;    // [n] dtype
  double* out;      // [1]
  double* partial;  // workspace [ceil(n / kSumSquaresChunk)]
  int64_t n;
  DType dtype;
};
void sum_squares(const SumSquaresParams& p);

// adamw: one update of fp32 masters, element by element, each operation rounded once and none fused:
//   g = grad * grad_scale;  m = m * beta1 + g * rest1;  v = v * beta2 + (g * g) * rest2;
//   master = master * keep - (m / (sqrt(v) * root + eps)) * rate;  param = master, rounded to dtype;  grad = 0.
//   With t updates before this one: rest = 1 - beta, keep = 1 - lr * weight_decay, root = 1 / sqrt(1 - beta2^(t + 1)),
//   rate = lr / (1 - beta1^(t + 1)), all computed in fp64 and rounded once.
inline constexpr int kAdamwRevision = 1;
struct AdamwParams {
  void* param;        // [n] dtype
  float* master;      // [n]
  float* exp_avg;     // [n], m
  float* exp_avg_sq;  // [n], v
  float* grad;        // [n]
  int64_t n;
  float grad_scale, beta1, rest1, beta2, rest2, keep, root, eps, rate;
  DType dtype;
};
void adamw(const AdamwParams& p);

}  // namespace glmx
