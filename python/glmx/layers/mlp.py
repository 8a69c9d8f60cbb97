"""The dense SwiGLU MLP, also the shared expert of a MoE layer."""

from __future__ import annotations

import torch
from torch import nn

from glmx import ops
from glmx.layers.linear import Linear


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)). gate_up_proj.weight [2I, H] holds the gate rows, then the up rows, as the
    experts' does; a checkpoint stores them apart.
    """

    def __init__(self, hidden: int, intermediate: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden, 2 * intermediate, False, dtype, device)
        self.down_proj = Linear(intermediate, hidden, False, dtype, device)

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        return self.down_proj(ops.linear(x_TH, self.gate_up_proj.weight, silu_mul=True))
