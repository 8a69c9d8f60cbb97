"""silu_mul: the SwiGLU activation of the dense and expert MLPs."""

from __future__ import annotations

import torch
from torch import Tensor

from glmx.ops._library import apply, check_dim, check_model_dtype, op

_forward = op("silu_mul")
_backward = op("silu_mul_backward")


class SiluMulFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = x.new_empty(x.shape[0], x.shape[1] // 2)
        _forward(y, x)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return silu_mul_gradient(dy.contiguous(), x)


def silu_mul_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dx [T, 2I] from dy [T, I] and the pre-activations x [T, 2I]."""
    dx = torch.empty_like(x)
    _backward(dx, dy, x)
    return dx


def silu_mul(x: Tensor) -> Tensor:
    """y = silu(gate) * up, where gate is the first half of the columns of x and up the second.

    Args:
        x: [T, 2I], fp32 or bf16; made contiguous if it is not.

    Returns:
        [T, I] in the dtype of x: computed in fp32 and rounded once. `grouped_gemm(..., silu_mul=True)` computes the
        same function from unrounded fp32 pre-activations.

    Raises:
        ValueError: a dtype other than fp32 or bf16, not 2 dimensions, an odd or empty number of columns.

    Differentiable. Source: Shazeer 2020, arXiv 2002.05202 (SwiGLU).
    """
    check_model_dtype(x, "x")
    check_dim(x, "x", 2)
    return apply(SiluMulFunction, x.contiguous())
