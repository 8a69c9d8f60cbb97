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
    out = torch.zeros(inverse.shape[0], rows.shape[1], dtype=F64)
    for k in range(inverse.shape[1]):
        index = inverse[:, k].long()
        if rows.shape[0] == 0:
            continue
        term = topk_weights[:, k, None].to(F64) * rows[index.clamp(min=0)].to(F64)
        out = out + torch.where((index >= 0)[:, None], term, torch.zeros((), dtype=F64))
    return out if exact else out.to(rows.dtype)
