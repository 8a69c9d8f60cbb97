"""Oracle of layer_norm (Ba, Kiros & Hinton 2016), one rounding at the end."""

from __future__ import annotations

import torch

F64 = torch.float64


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, *, exact: bool = False
) -> torch.Tensor:
    """x [.., H], weight [H], bias [H] -> [.., H]: (x - mean) / sqrt(var + eps) * weight + bias."""
    x64 = x.to(F64)
    centred = x64 - x64.mean(dim=-1, keepdim=True)
    y = centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + eps) * weight.to(F64) + bias.to(F64)
    return y if exact else y.to(x.dtype)
