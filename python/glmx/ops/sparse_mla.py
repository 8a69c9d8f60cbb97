"""sparse_mla: absorbed multi-head latent attention over listed keys, with gradients."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glmx.ops._library import check_dim, check_model_dtype, check_same_dtype, op
from glmx.ops.attention import Attended, KeyRows

_forward = op("sparse_mla")
_backward = op("sparse_mla_backward")


def _compute(q_TAd, kv_Rd, lists_Tk, keys: KeyRows, v_dim: int, scale: float, with_lse: bool):
    T, A, _ = q_TAd.shape
    out_TAv = q_TAd.new_empty(T, A, v_dim)
    lse_TA = q_TAd.new_empty(T, A, dtype=torch.float32) if with_lse else None
    _forward(out_TAv, lse_TA, q_TAd, kv_Rd, lists_Tk, *keys, scale)
    return out_TAv, lse_TA


class SparseMlaFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_TAd, kv_Rd, lists_Tk, keys: KeyRows, v_dim: int, scale: float):
        out_TAv, lse_TA = _compute(q_TAd, kv_Rd, lists_Tk, keys, v_dim, scale, with_lse=True)
        ctx.save_for_backward(q_TAd, kv_Rd, lists_Tk, out_TAv, lse_TA, *keys)
        ctx.scale = scale
        ctx.mark_non_differentiable(lse_TA)
        return out_TAv, lse_TA

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out_TAv: Tensor, _lse):
        q_TAd, kv_Rd, lists_Tk, out_TAv, lse_TA, cu_seqlens_q, seq_lens, cu_seqlens_k, _ = ctx.saved_tensors
        if cu_seqlens_k is None:
            raise ValueError("sparse_mla: keys given by block_table have no gradient: train with cu_seqlens_k")
        d_q, d_kv = torch.empty_like(q_TAd), torch.empty_like(kv_Rd)
        saved = (q_TAd, kv_Rd, lists_Tk, out_TAv, lse_TA)
        _backward(d_q, d_kv, d_out_TAv.contiguous(), *saved, cu_seqlens_q, seq_lens, cu_seqlens_k, ctx.scale)
        return d_q, d_kv, None, None, None, None


@overload
def sparse_mla(
    q: Tensor,
    kv: Tensor,
    topk_indices: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    scale: float,
    v_dim: int,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def sparse_mla(
    q: Tensor,
    kv: Tensor,
    topk_indices: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    scale: float,
    v_dim: int,
    return_lse: Literal[True],
) -> Attended: ...
def sparse_mla(
    q: Tensor,
    kv: Tensor,
    topk_indices: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    scale: float,
    v_dim: int,
    return_lse: bool = False,
) -> Tensor | Attended:
    """softmax(q kv^T * scale) kv[:, :v_dim] over the keys that topk_indices lists for each query row.

    Args:
        q: [T, A, Dk], fp32 or bf16: absorbed queries (GLM: 512 latent and 64 rotary values) of B flat sequences.
        kv: [rows, Dk], the dtype of q: one latent row per key; its first v_dim values are the value.
        topk_indices: int32 [T, k]: positions in the row's own sequence, ascending, each below the number of keys that
            the row sees; unused places at the end are -1. From `indexer_topk`.
        cu_seqlens_q: int32 [B+1], ascending from 0 to T: sequence i owns query rows
            [cu_seqlens_q[i], cu_seqlens_q[i+1]), its last tokens.
        seq_lens: int32 [B]: its keys in all, at least its query rows.
        cu_seqlens_k: int32 [B+1]: key j of sequence i is row cu_seqlens_k[i] + j of kv; or
        block_table: int32 [B, max_blocks]: key j is row block_table[i, j // 64] * 64 + j % 64. Exactly one is given.
        scale: of the scores. Absorbed MLA keeps that of its expanded heads:
            (qk_nope_head_dim + qk_rope_head_dim) ** -0.5.
        v_dim: Dv, at most Dk.
        return_lse: return Attended(out, lse).

    Returns:
        out [T, A, Dv] in the dtype of q, or Attended; a row without keys gets zeros and an lse of +inf. Lists that name
        every key a row sees give the bits of `attention` on the same latent. Rows stand alone, as there.

    Raises:
        ValueError: dtypes or shapes that do not fit; lists that are not ascending, or name a key the row does not see.

    Differentiable in q and kv (not through lse) when keys are contiguous; a backward over paged keys is refused. A
    key's gradient is summed over the query rows that list it, in order.
    Source: DSA, DeepSeek-V3.2-Exp technical report, 2025; MLA and absorption, arXiv 2405.04434, section 2.1.
    """
    check_model_dtype(q, "q")
    check_dim(q, "q", 3)
    check_dim(kv, "kv", 2)
    check_same_dtype(kv, "kv", q.dtype)
    check_same_dtype(topk_indices, "topk_indices", torch.int32)
    check_dim(topk_indices, "topk_indices", 2)
    keys = KeyRows(cu_seqlens_q, seq_lens, cu_seqlens_k, block_table)
    q, kv, lists = q.contiguous(), kv.contiguous(), topk_indices.contiguous()
    if torch.is_grad_enabled() and (q.requires_grad or kv.requires_grad):
        out, lse = SparseMlaFunction.apply(q, kv, lists, keys, v_dim, float(scale))
    else:
        out, lse = _compute(q, kv, lists, keys, v_dim, float(scale), return_lse)
    return Attended(out, lse) if return_lse else out
