"""attention: causal attention of flat sequences to their own keys: grouped heads or one latent, paged or not."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glmx.ops._library import check_dim, check_model_dtype, check_same_dtype, op

_forward = op("attention")
_backward = op("attention_backward")


class Attended(NamedTuple):
    """out [T, A, Dv] in the dtype of q; lse fp32 [T, A] (natural log, +inf where a row has no key)."""

    out: Tensor
    lse: Tensor


class KeyRows(NamedTuple):
    """Which rows are queries and keys; int32 tensors."""

    cu_seqlens_q: Tensor
    seq_lens: Tensor
    cu_seqlens_k: Tensor | None
    block_table: Tensor | None


def _compute(q_TAd, k_RGd, v_RGd, keys: KeyRows, v_dim: int, scale: float, with_lse: bool):
    T, A, _ = q_TAd.shape
    out_TAv = q_TAd.new_empty(T, A, v_dim)
    lse_TA = q_TAd.new_empty(T, A, dtype=torch.float32) if with_lse else None
    _forward(out_TAv, lse_TA, q_TAd, k_RGd, v_RGd, *keys, scale)
    return out_TAv, lse_TA


class AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_TAd, k_RGd, v_RGd, keys: KeyRows, v_dim: int, scale: float):
        out_TAv, lse_TA = _compute(q_TAd, k_RGd, v_RGd, keys, v_dim, scale, with_lse=True)
        ctx.save_for_backward(q_TAd, k_RGd, v_RGd, out_TAv, lse_TA, *keys)
        ctx.scale = scale
        ctx.mark_non_differentiable(lse_TA)
        return out_TAv, lse_TA

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out_TAv: Tensor, _lse):
        q_TAd, k_RGd, v_RGd, out_TAv, lse_TA, cu_seqlens_q, seq_lens, cu_seqlens_k, _ = ctx.saved_tensors
        if cu_seqlens_k is None:
            raise ValueError("attention: keys given by block_table have no gradient: train with cu_seqlens_k")
        d_q, d_k = torch.empty_like(q_TAd), torch.empty_like(k_RGd)
        d_v = None if v_RGd is None else torch.empty_like(v_RGd)
        saved = (q_TAd, k_RGd, v_RGd, out_TAv, lse_TA)
        _backward(d_q, d_k, d_v, d_out_TAv.contiguous(), *saved, cu_seqlens_q, seq_lens, cu_seqlens_k, ctx.scale)
        return d_q, d_k, d_v, None, None, None


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    v_dim: int | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    v_dim: int | None = None,
    return_lse: Literal[True],
) -> Attended: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    v_dim: int | None = None,
    return_lse: bool = False,
) -> Tensor | Attended:
    """softmax(q k^T * scale) v, each query row over its own sequence's keys up to itself.

    Args:
        q: [T, A, Dk], fp32 or bf16: the flat query rows of B sequences.
        k: [rows, G, Dk], the dtype of q; A % G == 0, query head a uses kv head a // (A // G).
        v: [rows, G, Dv], the dtype of q; None: the first v_dim values of k are the values (absorbed MLA, G == 1).
        cu_seqlens_q: int32 [B+1], ascending from 0 to T: sequence i owns query rows
            [cu_seqlens_q[i], cu_seqlens_q[i+1]), its last tokens.
        seq_lens: int32 [B]: its keys in all, at least its query rows.
        cu_seqlens_k: int32 [B+1]: key j of sequence i is row cu_seqlens_k[i] + j of k and v; or
        block_table: int32 [B, max_blocks]: key j is row block_table[i, j // 64] * 64 + j % 64. Exactly one is given.
        scale: of the scores; default Dk ** -0.5.
        v_dim: Dv when v is None.
        return_lse: return Attended(out, lse).

    Returns:
        out [T, A, Dv] in the dtype of q, or Attended. Softmax in fp32, probabilities rounded to the dtype before they
        meet v, one rounding at the end. A query row's bits depend on its own sequence alone, and are the same whether
        its keys came in one call, in chunks or one by one, paged or contiguous.

    Raises:
        ValueError: dtypes or shapes that do not fit, lengths that do not fit the rows, pages outside the cache.

    Differentiable in q, k and v (not through lse) when keys are contiguous; a backward over paged keys is refused.
    Source: online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867; Dao 2023, arXiv 2307.08691.
    """
    check_model_dtype(q, "q")
    check_dim(q, "q", 3)
    check_dim(k, "k", 3)
    check_same_dtype(k, "k", q.dtype)
    if v is not None:
        check_dim(v, "v", 3)
        check_same_dtype(v, "v", q.dtype)
        if v_dim not in (None, v.shape[2]):
            raise ValueError(f"v_dim: expected v.shape[2] == {v.shape[2]}: got {v_dim}")
        v_dim = v.shape[2]
    elif v_dim is None:
        raise ValueError("v_dim: expected the number of values per key when v is None: got None")
    keys = KeyRows(cu_seqlens_q, seq_lens, cu_seqlens_k, block_table)
    q, k, v = q.contiguous(), k.contiguous(), None if v is None else v.contiguous()
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v)):
        out, lse = AttentionFunction.apply(q, k, v, keys, v_dim, scale)
    else:
        out, lse = _compute(q, k, v, keys, v_dim, scale, return_lse)
    return Attended(out, lse) if return_lse else out
