"""Oracle of silu_mul, the SwiGLU activation (Shazeer 2020): silu(gate) * up."""

from __future__ import annotations

import torch

F64 = torch.float64


def silu_mul(x: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
    """x [T, 2I], gate columns first -> [T, I] = silu(gate) * up, one rounding to x.dtype."""
    gate, up = x.to(F64).chunk(2, dim=-1)
    y = gate * torch.sigmoid(gate) * up
    return y if exact else y.to(x.dtype)
