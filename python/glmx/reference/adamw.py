"""Oracle of adamw: the update of arXiv 1711.05101 in the dtype of the masters, which may be fp64."""

from __future__ import annotations

import torch


def adamw(
    param: torch.Tensor,
    master: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad: torch.Tensor,
    *,
    updates: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float = 1.0,
) -> None:
    """All of one shape, all written in place; grad ends at zero."""
    g = grad * grad_scale
    exp_avg.copy_(beta1 * exp_avg + (1.0 - beta1) * g)
    exp_avg_sq.copy_(beta2 * exp_avg_sq + (1.0 - beta2) * g * g)
    m, v = exp_avg / (1.0 - beta1**updates), exp_avg_sq / (1.0 - beta2**updates)
    master.copy_(master * (1.0 - lr * weight_decay) - lr * m / (v.sqrt() + eps))
    param.copy_(master)
    grad.zero_()
