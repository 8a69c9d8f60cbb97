"""Oracle of cache_append: rows into a cache by slot, one after the other."""

from __future__ import annotations

import torch


def cache_append(cache: torch.Tensor, rows: torch.Tensor, slot_mapping: torch.Tensor, column: int = 0) -> torch.Tensor:
    """cache [R, stride], rows [T, W], slot_mapping int64 [T] -> cache, written in token order; -1 is skipped."""
    for t, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            cache[slot, column : column + rows.shape[1]] = rows[t].detach()
    return cache
