"""Oracle of route_topk: sigmoid routing with a selection bias and group limits (DeepSeek-V3, GLM-4.5)."""

from __future__ import annotations

import torch

F64 = torch.float64


def total_order(score: torch.Tensor) -> torch.Tensor:
    """The score that selections compare: -0 counts as +0 and NaN as -inf."""
    return torch.where(torch.isnan(score), float("-inf"), score + 0.0)


def first_k(score: torch.Tensor, k: int) -> torch.Tensor:
    """Indices [.., k] of the k largest, in descending order, ties to the lower index. torch.topk promises
    neither.
    """
    return torch.sort(total_order(score), dim=-1, descending=True, stable=True).indices[..., :k]


def select_experts(biased_TE: torch.Tensor, top_k: int, n_group: int = 1, topk_group: int = 1) -> torch.Tensor:
    """biased scores [T, E] -> ids [T, K]: keep topk_group groups by the sum of their two best, then the best
    K.
    """
    T, E = biased_TE.shape
    score_TE = total_order(biased_TE)
    if n_group > 1:
        per_group = score_TE.view(T, n_group, E // n_group)
        best_two = torch.sort(per_group, dim=-1, descending=True).values[..., :2]
        kept = first_k(best_two.sum(dim=-1), topk_group)
        mask = torch.zeros(T, n_group, dtype=torch.bool).scatter_(1, kept, True)
        score_TE = per_group.masked_fill(~mask[..., None], float("-inf")).reshape(T, E)
    return first_k(score_TE, top_k)


def route_topk(
    logits: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    *,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    return_scores: bool = False,
    exact: bool = False,
) -> tuple[torch.Tensor, ...]:
    """logits [T, E], bias [E] -> (topk_weights [T, K], topk_ids int32 [T, K], expert_counts int32 [E] [,
    scores]).

    The bias takes part in the selection only. Scores are rounded to fp32 before the bias is added, and so is
    the sum: the selection is defined on fp32 values.
    """
    E = logits.shape[1]
    scores = torch.sigmoid(logits.to(F64))
    if not exact:
        scores = scores.float()
    biased = scores.detach().float() + bias.detach().float()
    ids = select_experts(biased, top_k, n_group, topk_group)
    weights = torch.gather(scores.to(F64), 1, ids)
    if norm_topk_prob:
        weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-20)
    weights = weights * routed_scaling_factor
    counts = torch.bincount(ids.flatten(), minlength=E).int()
    out = (weights if exact else weights.float(), ids.int(), counts)
    return (*out, scores) if return_scores else out
