"""Oracle of embedding: rows of a table by id."""

from __future__ import annotations

import torch


def embedding(ids: torch.Tensor, weight: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
    """ids [T] int64, weight [V, H] -> [T, H]. The gradient of a row is the sum over its tokens, in token
    order.
    """
    return (weight.to(torch.float64) if exact else weight)[ids]
