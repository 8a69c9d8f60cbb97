"""rope_cos_sin and rope: rotary position embedding, half-split or interleaved, whole or partial."""

from __future__ import annotations

import torch
from torch import Tensor

from glmx.ops._library import apply, check_dim, check_model_dtype, check_same_dtype, op

_cos_sin = op("rope_cos_sin")
_rotate = op("rope")


def rope_cos_sin(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i / rotary_dim), i in [0, rotary_dim / 2).

    Args:
        positions: [T] int64, each in [0, 2^31).
        rotary_dim: even, at least 2.
        theta: the base of the frequencies, in [1, 1e30].

    Returns:
        (cos, sin), each fp32 [T, rotary_dim / 2]: the exact angle, reduced in twice fp64's precision, each result
        rounded once. No table: the bits of a position depend on nothing else, at 1M as at 0.

    Raises:
        ValueError: a dtype, shape or value other than the above.

    Source: Su et al. 2021, arXiv 2104.09864.
    """
    check_dim(positions, "positions", 1)
    check_same_dtype(positions, "positions", torch.int64)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim: expected an even number >= 2: got {rotary_dim}")
    shape = (positions.shape[0], rotary_dim // 2)
    cos = torch.empty(shape, dtype=torch.float32, device=positions.device)
    sin = torch.empty_like(cos)
    _cos_sin(cos, sin, positions.contiguous(), theta)
    return cos, sin


class RopeFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TAD: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        y_TAD = torch.empty_like(x_TAD)
        _rotate(y_TAD, x_TAD, cos, sin, interleaved, False)
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return y_TAD

    @staticmethod
    def backward(ctx, dy_TAD: Tensor):
        cos, sin = ctx.saved_tensors
        dy_TAD = dy_TAD.contiguous()
        dx_TAD = torch.empty_like(dy_TAD)
        _rotate(dx_TAD, dy_TAD, cos, sin, ctx.interleaved, True)
        return dx_TAD, None, None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the first r = 2 * cos.shape[1] dims of every head; the dims behind them are copied.

    Args:
        x: [T, A, d], fp32 or bf16 (A heads of d dims), r <= d; made contiguous if it is not.
        cos, sin: fp32 [T, r / 2], from `rope_cos_sin`.
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + r / 2). Every element stays in its place.

    Returns:
        [T, A, d] in the dtype of x: (a cos - b sin, b cos + a sin) for each pair (a, b). cos, sin, each product and
        each sum are rounded to the dtype (Hugging Face's `apply_rotary_pos_emb`).

    Raises:
        ValueError: dtypes or shapes that do not fit.

    Differentiable in x: the gradient is the rotation by the negative angle.
    """
    check_model_dtype(x, "x")
    check_dim(x, "x", 3)
    for name, tensor in (("cos", cos), ("sin", sin)):
        check_same_dtype(tensor, name, torch.float32)
        check_dim(tensor, name, 2)
        if tensor.shape[0] != x.shape[0] or tensor.shape != cos.shape or 2 * tensor.shape[1] > x.shape[2]:
            raise ValueError(f"{name}: expected shape [x.shape[0], up to x.shape[2] / 2]: got {list(tensor.shape)}")
    return apply(RopeFunction, x.contiguous(), cos.contiguous(), sin.contiguous(), interleaved)
