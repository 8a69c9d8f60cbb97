"""add_rms_norm: the residual add and the norm that follows it, in one pass over the row."""

from __future__ import annotations

import torch
from torch import Tensor

from glmx.ops._library import apply, check_model_dtype, check_same_dtype, op
from glmx.ops.rms_norm import rms_norm_gradients

_forward = op("add_rms_norm")


class AddRmsNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        y_TH, total_TH = torch.empty_like(x_TH), torch.empty_like(x_TH)
        needs_grad = any(ctx.needs_input_grad)
        rstd_T = torch.empty(x_TH.shape[0], dtype=torch.float32, device=x_TH.device) if needs_grad else None
        _forward(y_TH, total_TH, rstd_T, x_TH, residual_TH, weight_H, eps)
        if needs_grad:
            ctx.save_for_backward(total_TH, weight_H, rstd_T)
        return y_TH, total_TH

    @staticmethod
    def backward(ctx, dy_TH: Tensor | None, d_total_TH: Tensor | None):
        if dy_TH is None:
            return d_total_TH, d_total_TH, None, None
        total_TH, weight_H, rstd_T = ctx.saved_tensors
        dx_TH, d_weight = rms_norm_gradients(dy_TH.contiguous(), total_TH, weight_H, rstd_T)
        if d_total_TH is not None:
            dx_TH += d_total_TH
        return dx_TH, dx_TH, d_weight, None


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """residual_out = residual + x; y = rms_norm(residual_out, weight, eps).

    Args:
        x, residual: [..., H], fp32 or bf16, the same shape and dtype; made contiguous if they are not.
        weight: [H], the dtype of x.
        eps: added to the mean of squares, >= 0.

    Returns:
        (y, residual_out), both [..., H] in the dtype of x. The sum is rounded to the dtype before the norm reads it:
        the bits are those of `rms_norm(residual + x, weight, eps)`.

    Raises:
        ValueError: a dtype other than fp32 or bf16, shapes that differ, a weight that does not fit, a negative eps.

    Differentiable in x, residual and weight (`weight.main_grad`, when set, receives the weight's gradient).
    """
    check_model_dtype(x, "x")
    check_same_dtype(residual, "residual", x.dtype)
    check_same_dtype(weight, "weight", x.dtype)
    if residual.shape != x.shape:
        raise ValueError(f"residual: expected the shape of x, {list(x.shape)}: got {list(residual.shape)}")
    if x.dim() < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: expected shape [x.shape[-1]]: got {list(weight.shape)}, x is {list(x.shape)}")
    H = x.shape[-1]
    rows = x.reshape(-1, H).contiguous(), residual.reshape(-1, H).contiguous()
    y, total = apply(AddRmsNormFunction, *rows, weight.contiguous(), eps)
    return y.view(x.shape), total.view(x.shape)
