"""Oracle of expert_plan: rows sorted by expert, tokens in order inside an expert."""

from __future__ import annotations

from typing import NamedTuple

import torch


class ExpertPlan(NamedTuple):
    """expert_offsets int32 [E+1], row_token int32 [T*K] (-1 past the last row), inverse int32 [T, K] (-1:
    skipped).
    """

    expert_offsets: torch.Tensor
    row_token: torch.Tensor
    inverse: torch.Tensor


def expert_plan(topk_ids: torch.Tensor, num_experts: int) -> ExpertPlan:
    """topk_ids int32 [T, K], -1 for no expert -> the plan of the grouped GEMM."""
    T, K = topk_ids.shape
    rows: list[list[tuple[int, int]]] = [[] for _ in range(num_experts)]
    for t, ids in enumerate(topk_ids.tolist()):
        for k, e in enumerate(ids):
            if e >= 0:
                rows[e].append((t, k))
    offsets = [0]
    row_token = torch.full((T * K,), -1, dtype=torch.int32)
    inverse = torch.full((T, K), -1, dtype=torch.int32)
    for expert_rows in rows:
        for i, (t, k) in enumerate(expert_rows):
            row_token[offsets[-1] + i] = t
            inverse[t, k] = offsets[-1] + i
        offsets.append(offsets[-1] + len(expert_rows))
    return ExpertPlan(torch.tensor(offsets, dtype=torch.int32), row_token, inverse)
