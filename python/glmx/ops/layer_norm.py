"""layer_norm: normalisation of rows to mean 0 and variance 1, then weight and bias."""

from __future__ import annotations

import torch
from torch import Tensor

from glmx.ops._library import apply, check_model_dtype, check_same_dtype, op, weight_gradient

_forward = op("layer_norm")
_backward = op("layer_norm_backward")


class LayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float) -> Tensor:
        y_TH, mean_T, rstd_T = torch.empty_like(x_TH), None, None
        if any(ctx.needs_input_grad):
            mean_T = torch.empty(x_TH.shape[0], dtype=torch.float32, device=x_TH.device)
            rstd_T = torch.empty_like(mean_T)
        _forward(y_TH, mean_T, rstd_T, x_TH, weight_H, bias_H, eps)
        ctx.save_for_backward(x_TH, weight_H, bias_H, mean_T, rstd_T)
        return y_TH

    @staticmethod
    def backward(ctx, dy_TH: Tensor):
        x_TH, weight_H, bias_H, mean_T, rstd_T = ctx.saved_tensors
        dy_TH, dx_TH, d_bias_H = dy_TH.contiguous(), torch.empty_like(x_TH), None

        def accumulate(d_weight: Tensor, add_weight: bool) -> None:
            """One pass gives both gradients; either may go into its parameter's `main_grad`."""
            nonlocal d_bias_H
            d_bias_H = weight_gradient(
                bias_H,
                lambda d_bias, add_bias: _backward(
                    dx_TH, d_weight, d_bias, dy_TH, x_TH, weight_H, mean_T, rstd_T, add_weight, add_bias
                ),
            )

        d_weight_H = weight_gradient(weight_H, accumulate)
        return dx_TH, d_weight_H, d_bias_H, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the last dimension.

    Args:
        x: [..., H], fp32 or bf16. Any leading shape; made contiguous if it is not.
        weight: [H], the dtype of x.
        bias: [H], the dtype of x.
        eps: added to the variance, >= 0. The variance is that of the row itself (divided by H, not H - 1).

    Returns:
        [..., H] in the dtype of x. Everything is fp32 up to one rounding at the end.

    Raises:
        ValueError: a dtype other than fp32 or bf16, a weight or bias that does not fit, a negative eps.

    Differentiable in x, weight and bias (`main_grad` of weight and bias, when set, receives the gradient).
    Source: Ba, Kiros and Hinton 2016, arXiv 1607.06450, eq. 4.
    """
    check_model_dtype(x, "x")
    for tensor, name in ((weight, "weight"), (bias, "bias")):
        check_same_dtype(tensor, name, x.dtype)
        if x.dim() < 1 or tensor.shape != x.shape[-1:]:
            raise ValueError(f"{name}: expected shape [x.shape[-1]]: got {list(tensor.shape)}, x is {list(x.shape)}")
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return apply(LayerNormFunction, rows, weight.contiguous(), bias.contiguous(), eps).view(x.shape)
