"""expert_plan: the stable permutation that groups (token, k) pairs by expert."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from glmx.ops._library import check_dim, check_same_dtype, op

_plan = op("expert_plan")


class ExpertPlan(NamedTuple):
    """Where each (token, k) pair goes. R = T * K; the first `expert_offsets[-1]` rows are in use."""

    expert_offsets: Tensor
    """int32 [E + 1]: the rows of expert e are [expert_offsets[e], expert_offsets[e + 1])."""
    row_token: Tensor
    """int32 [R]: the token of each row; -1 past the last row in use."""
    inverse: Tensor
    """int32 [T, K]: the row of each pair; -1 where the id was -1."""


def expert_plan(topk_ids: Tensor, num_experts: int) -> ExpertPlan:
    """Sorts (token, k) pairs by expert; inside an expert they keep the order of tokens, then of k.

    Args:
        topk_ids: int32 [T, K], the expert of each pair; -1 for a pair that goes to no expert.
        num_experts: E >= 1.

    Returns:
        ExpertPlan(expert_offsets int32 [E + 1], row_token int32 [T * K], inverse int32 [T, K]).
        `expert_offsets[1:]` is what torch's grouped_mm calls `offs`.

    Raises:
        ValueError: ids of another dtype or rank, or an id that is neither -1 nor in [0, num_experts).

    Not differentiable: integers in, integers out.
    """
    check_dim(topk_ids, "topk_ids", 2)
    check_same_dtype(topk_ids, "topk_ids", torch.int32)
    if num_experts < 1:
        raise ValueError(f"num_experts: expected >= 1: got {num_experts}")

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=topk_ids.device)

    plan = ExpertPlan(empty(num_experts + 1), empty(topk_ids.numel()), empty(*topk_ids.shape))
    _plan(*plan, topk_ids.contiguous(), num_experts)
    return plan
