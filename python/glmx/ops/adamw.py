"""adamw: one update of fp32 masters and their moments in one pass over memory, rounded to the parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glmx.ops._library import check_model_dtype, check_same_dtype, op

_adamw = op("adamw")


def adamw(
    param: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    updates: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float = 1.0,
) -> None:
    """One AdamW update, in place: moments, master, then param = master rounded once. Leaves grad at zero.

    Args:
        param: any shape, fp32 or bf16, contiguous; written.
        master, exp_avg, exp_avg_sq, grad: fp32, the shape of param, contiguous; read and written.
        updates: how many updates there have been, this one included: the t of the bias corrections.
        lr, beta1, beta2, eps, weight_decay: as torch.optim.AdamW's, weight decay decoupled.
        grad_scale: grad is multiplied by it first (clipping).

    Returns:
        None.

    Raises:
        ValueError: dtypes or shapes that do not fit, a tensor that is not contiguous, updates < 1, a beta outside
            [0, 1).

    mul, add, div and sqrt, each rounded once and none fused, so an element's bits depend neither on threads nor on
    where it lies. Denormals are flushed to zero. Not differentiable.
    Source: Loshchilov and Hutter 2019, arXiv 1711.05101.
    """
    check_model_dtype(param, "param")
    state = {"master": master, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "grad": grad}
    for name, tensor in state.items():
        check_same_dtype(tensor, name, torch.float32)
        if tensor.shape != param.shape:
            raise ValueError(f"{name}: expected shape {list(param.shape)} (param.shape): got {list(tensor.shape)}")
    for name, tensor in {"param": param, **state}.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor: got strides {list(tensor.stride())}")
    if updates < 1:
        raise ValueError(f"updates: expected 1 or more, this one included: got {updates}")
    for name, beta in {"beta1": beta1, "beta2": beta2}.items():
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name}: expected a value in [0, 1): got {beta}")
    with torch.no_grad():
        _adamw(
            *(tensor.detach().view(-1) for tensor in (param, *state.values())),
            grad_scale,
            beta1,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            1.0 - lr * weight_decay,
            1.0 / math.sqrt(1.0 - beta2**updates),
            eps,
            lr / (1.0 - beta1**updates),
        )
