"""Oracle of indexer_topk: every score of a row, then a stable sort."""

from __future__ import annotations

import torch

from glmx.reference.attention import key_rows
from glmx.reference.gemm_tree import flush32, fma32, gemm_tree

F64 = torch.float64


def index_scores(q: torch.Tensor, weights: torch.Tensor, k: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
    """q [T, Hi, Di], weights [T, Hi], k [S, Di] -> I [T, S], fp32 with the bits of the op; fp64 if exact."""
    T, Hi, Di = q.shape
    if exact:
        dots_THS = q.to(F64) @ k.to(F64).T
        return (weights.to(F64)[:, :, None] * torch.where(dots_THS < 0, 0.0, dots_THS)).sum(1)
    dots_THS = gemm_tree(q.reshape(T * Hi, Di), k).to(F64).view(T, Hi, -1)
    relu_THS, weights_TH = torch.where(dots_THS < 0, 0.0, dots_THS), flush32(weights.to(F64))
    sum_TS = torch.zeros(T, k.shape[0], dtype=F64)
    for h in range(Hi):
        sum_TS = fma32(weights_TH[:, h, None], relu_THS[:, h], sum_TS)
    return sum_TS.float()


def best_keys(scores_S: torch.Tensor, top_k: int) -> torch.Tensor:
    """Positions of the best top_k of S scores, int64, ascending: -0 is +0, NaN is -inf, ties to the lower position."""
    plain_S = torch.where(scores_S.isnan(), float("-inf"), scores_S + 0.0)
    return torch.sort(plain_S, descending=True, stable=True).indices[:top_k].sort().values


def indexer_topk(
    q: torch.Tensor,
    weights: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    top_k: int,
    *,
    cu_seqlens_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """q [T, Hi, Di], weights [T, Hi], k [rows, Di] -> topk_indices int32 [T, top_k], ascending, then -1.

    The scores have the op's bits, so its lists are these lists; with `exact` they are fp64.
    """
    bounds = cu_seqlens_q.tolist()
    lists = torch.full((q.shape[0], top_k), -1, dtype=torch.int32)
    for i, n in enumerate(seq_lens.tolist()):
        tokens = slice(bounds[i], bounds[i + 1])
        if bounds[i] == bounds[i + 1]:
            continue
        rows = key_rows(i, n, cu_seqlens_k, block_table)
        scores_TS = index_scores(q[tokens], weights[tokens], k[rows], exact=exact)
        for t, scores_S in enumerate(scores_TS, bounds[i]):
            best = best_keys(scores_S[: n - (bounds[i + 1] - 1 - t)], top_k)
            lists[t, : len(best)] = best.int()
    return lists
