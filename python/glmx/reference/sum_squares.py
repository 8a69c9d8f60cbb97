"""Oracle of sum_squares: the sum of squares of a tensor, or of a list of them, as one fp64 scalar."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def sum_squares(x: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """One fp64 scalar. Each square is exact in fp64; the sum is rounded only by fp64 additions."""
    tensors = [x] if isinstance(x, torch.Tensor) else list(x)
    total = torch.zeros((), dtype=torch.float64)
    for tensor in tensors:
        total = total + tensor.detach().to(torch.float64).square().sum()
    return total
