"""Oracle of add_rms_norm: the residual add and the norm after it, with the sum rounded between them."""

from __future__ import annotations

import torch

from glmx.reference.rms_norm import rms_norm

F64 = torch.float64


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, exact: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual_out = round(residual + x), y = rms_norm(residual_out); returns (y, residual_out)."""
    total = residual.to(F64) + x.to(F64)
    residual_out = total if exact else total.to(x.dtype)
    return rms_norm(residual_out, weight, eps, exact=exact), residual_out
