"""indexer_topk: the keys that DSA's lightning indexer picks for each query row."""

from __future__ import annotations

import torch
from torch import Tensor

from glmx.ops._library import check_dim, check_model_dtype, check_same_dtype, op

_forward = op("indexer_topk")


def indexer_topk(
    q: Tensor,
    weights: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    top_k: int,
    *,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """The top_k keys of each query row by I[s] = sum over heads h of weights[h] * relu(q[h] . k[s]).

    Args:
        q: [T, Hi, Di], fp32 or bf16: index queries (GLM-5: 32 heads of 128) of B flat sequences.
        weights: fp32 [T, Hi], of either sign: the head weights, with Hi ** -0.5 * Di ** -0.5 folded in.
        k: [rows, Di], the dtype of q: one index key per key.
        cu_seqlens_q: int32 [B+1], ascending from 0 to T: sequence i owns query rows
            [cu_seqlens_q[i], cu_seqlens_q[i+1]), its last tokens.
        seq_lens: int32 [B]: its keys in all, at least its query rows. A row sees the keys up to itself.
        top_k: keys to pick, at least 1.
        cu_seqlens_k: int32 [B+1]: key j of sequence i is row cu_seqlens_k[i] + j of k; or
        block_table: int32 [B, max_blocks]: key j is row block_table[i, j // 64] * 64 + j % 64. Exactly one is given.

    Returns:
        topk_indices int32 [T, top_k], what `sparse_mla` takes: positions in the row's own sequence, ascending; a row
        that sees fewer keys lists all of them, then -1. The selection is exact in a total order: score descending (-0
        as +0, NaN as -inf), then position ascending. Rows stand alone: a list depends on neither batch, chunking,
        pages nor threads.

    Raises:
        ValueError: dtypes or shapes that do not fit, top_k below 1, sequences that do not lie in k.

    No gradient: a selection has none (the indexer learns by its own loss).
    Source: DSA, DeepSeek-V3.2-Exp technical report, 2025, equation 1.
    """
    check_model_dtype(q, "q")
    check_dim(q, "q", 3)
    check_same_dtype(weights, "weights", torch.float32)
    check_dim(weights, "weights", 2)
    check_same_dtype(k, "k", q.dtype)
    check_dim(k, "k", 2)
    if top_k < 1:
        raise ValueError(f"top_k: expected at least 1: got {top_k}")
    q, weights, k = (x.detach().contiguous() for x in (q, weights, k))
    topk_indices_TK = q.new_empty(q.shape[0], top_k, dtype=torch.int32)
    _forward(topk_indices_TK, q, weights, k, cu_seqlens_q, seq_lens, cu_seqlens_k, block_table)
    return topk_indices_TK
