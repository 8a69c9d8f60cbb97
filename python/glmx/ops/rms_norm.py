"""rms_norm: root-mean-square normalisation of rows, in the rounding order of Hugging Face's models."""

from __future__ import annotations

import torch
from torch import Tensor

from glmx.ops._library import apply, check_model_dtype, check_same_dtype, op, weight_gradient

_forward = op("rms_norm")
_backward = op("rms_norm_backward")


class RmsNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        y_TH = torch.empty_like(x_TH)
        needs_grad = any(ctx.needs_input_grad)
        rstd_T = torch.empty(x_TH.shape[0], dtype=torch.float32, device=x_TH.device) if needs_grad else None
        _forward(y_TH, rstd_T, x_TH, weight_H, eps)
        if needs_grad:
            ctx.save_for_backward(x_TH, weight_H, rstd_T)
        return y_TH

    @staticmethod
    def backward(ctx, dy_TH: Tensor):
        x_TH, weight_H, rstd_T = ctx.saved_tensors
        return (*rms_norm_gradients(dy_TH.contiguous(), x_TH, weight_H, rstd_T), None)


def rms_norm_gradients(dy_TH: Tensor, x_TH: Tensor, weight_H: Tensor, rstd_T: Tensor) -> tuple[Tensor, Tensor | None]:
    """(dx, d_weight); d_weight is None when it went into `weight.main_grad`."""
    dx_TH = torch.empty_like(x_TH)

    def accumulate(out: Tensor, add: bool) -> None:
        _backward(dx_TH, out, dy_TH, x_TH, weight_H, rstd_T, add)

    d_weight = weight_gradient(weight_H, accumulate)
    return dx_TH, d_weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = weight * round(x / sqrt(mean(x^2) + eps)), over the last dimension.

    Args:
        x: [..., H], fp32 or bf16. Any leading shape; made contiguous if it is not.
        weight: [H], the dtype of x.
        eps: added to the mean of squares, >= 0.

    Returns:
        [..., H] in the dtype of x. The statistics are fp32; the normalised row is rounded to the dtype before it is
        multiplied by the weight, and the product is rounded again (Hugging Face's `*RMSNorm` modules).

    Raises:
        ValueError: a dtype other than fp32 or bf16, a weight that does not fit, a negative eps.

    Differentiable in x and weight (`weight.main_grad`, when set, receives the weight's gradient).
    Source: Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4.
    """
    check_model_dtype(x, "x")
    check_same_dtype(weight, "weight", x.dtype)
    if x.dim() < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: expected shape [x.shape[-1]]: got {list(weight.shape)}, x is {list(x.shape)}")
    y = apply(RmsNormFunction, x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous(), eps)
    return y.view(x.shape)
