"""Oracle of moe_combine: expert rows back to tokens, weighted, in the order of k."""

from __future__ import annotations

import torch

F64 = torch.float64


def moe_combine(
    rows: torch.Tensor, topk_weights: torch.Tensor, inverse: torch.Tensor, *, exact: bool = False
) -> torch.Tensor:
    """rows [R, H], topk_weights [T, K], inverse int32 [T, K] -> [T, H] = sum_k weight[t,k] *
    rows[inverse[t,k]].
    """
    R, H = rows.shape
    padded = torch.cat((rows.to(F64), torch.zeros(1, H, dtype=F64)))  # row R: what a skipped pair reads
    out = torch.zeros(inverse.shape[0], H, dtype=F64)
    for k in range(inverse.shape[1]):
        index = inverse[:, k].long()
        term = topk_weights[:, k, None].to(F64) * padded[torch.where(index < 0, R, index)]
        out = out + torch.where((index >= 0)[:, None], term, torch.zeros((), dtype=F64))
    return out if exact else out.to(rows.dtype)
