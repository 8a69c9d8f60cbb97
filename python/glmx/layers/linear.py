"""Linear: a weight and an optional bias under their checkpoint names, multiplied by glmx.ops.linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from glmx import ops


class Linear(nn.Module):
    """x [.., K] -> [.., N] = x @ weight.T + bias, in x's dtype or `out_dtype`. Starts uninitialised.

    glmx.load may put an ops.StoredWeight in the weight's place, but for kv_b_proj and lm_head.
    """

    weight: Any

    def __init__(
        self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    def forward(self, x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        return ops.linear(x, self.weight, self.bias, out_dtype=out_dtype)
