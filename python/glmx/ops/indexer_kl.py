"""indexer_kl: the loss that trains DSA's indexer, with gradients to the indexer alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glmx.ops._library import apply, check_dim, check_model_dtype, check_same_dtype, op
from glmx.ops.attention import KeyRows

_forward = op("indexer_kl")
_backward = op("indexer_kl_backward")


class IndexerKlFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, index_q_Thd, weights_Th, index_k_Rd, q_TAd, kv_Rd, lse_TA, lists_Tk, keys: KeyRows, scale: float):
        kl_T, index_lse_T, mass_T = (weights_Th.new_empty(weights_Th.shape[0]) for _ in range(3))
        inputs = (index_q_Thd, weights_Th, index_k_Rd, q_TAd, kv_Rd, lse_TA, lists_Tk)
        rows = (keys.cu_seqlens_q, keys.seq_lens, keys.cu_seqlens_k)
        _forward(kl_T, index_lse_T, mass_T, *inputs, *rows, scale)
        ctx.save_for_backward(*inputs, index_lse_T, mass_T, *rows)
        ctx.scale = scale
        return kl_T

    @staticmethod
    @once_differentiable
    def backward(ctx, d_kl_T: Tensor):
        saved = ctx.saved_tensors
        grads = [torch.empty_like(leaf) for leaf in saved[:3]]
        _backward(*grads, d_kl_T.contiguous(), *saved, ctx.scale)
        return *grads, None, None, None, None, None, None


def indexer_kl(
    index_q: Tensor,
    index_weights: Tensor,
    index_k: Tensor,
    q: Tensor,
    kv: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    *,
    cu_seqlens_k: Tensor,
    scale: float,
    topk_indices: Tensor | None = None,
) -> Tensor:
    """KL(p || softmax(I)) of each query token: p its main attention averaged over the heads, I its index scores.

    Over the keys s of the token's list: p[s] = mean over heads of exp(scale * q . kv[s] - lse), and
    I[s] = sum over index heads of index_weights * relu(index_q . index_k[s]), the scores of `indexer_topk`.

    Args:
        index_q: [T, Hi, Di], fp32 or bf16: the indexer's queries of B flat sequences.
        index_weights: fp32 [T, Hi], the factors Hi^-0.5 and Di^-0.5 already in them; of any sign.
        index_k: [rows, Di], the dtype of index_q: the indexer's keys.
        q: [T, A, Dk], the dtype of index_q: absorbed MLA queries of the main attention.
        kv: [rows, Dk], that dtype: its latent rows.
        lse: fp32 [T, A], of `attention` or `sparse_mla` over the same keys. p is not divided by its sum, which is 1
            up to rounding because of it.
        cu_seqlens_q: int32 [B+1], ascending from 0 to T: sequence i owns query rows
            [cu_seqlens_q[i], cu_seqlens_q[i+1]), its last tokens.
        seq_lens: int32 [B]: its keys in all, at least its query rows.
        cu_seqlens_k: int32 [B+1]: key j of sequence i is row cu_seqlens_k[i] + j of kv and of index_k.
        scale: of the main scores, as given to the main attention.
        topk_indices: int32 [T, k] as in `sparse_mla`: the sparse stage; None: every key that a token sees, the dense
            warm-up. Lists of all keys give the same bits.

    Returns:
        kl, fp32 [T]; 0 where a list is empty. Rounding can leave a KL of about 0 slightly negative. A sequence's bits
        do not depend on what else is in the batch.

    Raises:
        ValueError: dtypes or shapes that do not fit, lengths that do not fit the rows, lists that are not ascending
            or name a key that the token does not see.

    Differentiable in index_q, index_weights and index_k; q, kv and lse are constants, so that the main model learns
    from the language model's loss alone. Source: DeepSeek-V3.2 technical report, 2025, section 2.1 (equations 3, 4).
    """
    check_model_dtype(index_q, "index_q")
    check_dim(index_q, "index_q", 3)
    check_same_dtype(index_weights, "index_weights", torch.float32)
    check_dim(index_weights, "index_weights", 2)
    for name, tensor, dim in (("index_k", index_k, 2), ("q", q, 3), ("kv", kv, 2)):
        check_dim(tensor, name, dim)
        check_same_dtype(tensor, name, index_q.dtype)
    check_same_dtype(lse, "lse", torch.float32)
    check_dim(lse, "lse", 2)
    if topk_indices is not None:
        check_same_dtype(topk_indices, "topk_indices", torch.int32)
        check_dim(topk_indices, "topk_indices", 2)
        topk_indices = topk_indices.contiguous()
    leaves = [t.contiguous() for t in (index_q, index_weights, index_k)]
    constants = [t.detach().contiguous() for t in (q, kv, lse)]
    keys = KeyRows(cu_seqlens_q, seq_lens, cu_seqlens_k, None)
    return apply(IndexerKlFunction, *leaves, *constants, topk_indices, keys, float(scale))
