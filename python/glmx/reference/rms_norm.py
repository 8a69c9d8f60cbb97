"""Oracle of rms_norm (Zhang & Sennrich 2019, in the rounding order of the Hugging Face models)."""

from __future__ import annotations

import torch

F64 = torch.float64


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, exact: bool = False) -> torch.Tensor:
    """x [.., H], weight [H] -> [.., H]: weight * round(x / rms(x)), rounded again to x.dtype."""
    x64 = x.to(F64)
    y = x64 / torch.sqrt(x64.square().mean(dim=-1, keepdim=True) + eps)
    if exact:
        return weight.to(F64) * y
    return (weight.to(F64) * y.to(x.dtype).to(F64)).to(x.dtype)
