"""head_gemm: one small matrix product per attention head, on views."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glmx.ops._library import apply, check_dim, check_model_dtype, check_same_dtype, op

_forward = op("head_gemm")
_wgrad = op("head_gemm_wgrad")


class HeadGemmFunction(torch.autograd.Function):
    """w is [A, N, K], or [A, K, N] with `transposed`."""

    @staticmethod
    def forward(ctx, x_TAK: Tensor, w: Tensor, transposed: bool, out_TAN: Tensor) -> Tensor:
        _forward(out_TAN, x_TAK, w, transposed)
        ctx.save_for_backward(x_TAK, w)
        ctx.transposed = transposed
        return out_TAN

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TAN: Tensor):
        x_TAK, w = ctx.saved_tensors
        dy_TAN = dy_TAN.to(x_TAK.dtype).contiguous()
        dx_TAK = dw = None
        if ctx.needs_input_grad[0]:
            dx_TAK = x_TAK.new_empty(x_TAK.shape)
            _forward(dx_TAK, dy_TAN, w, not ctx.transposed)
        if ctx.needs_input_grad[1]:
            rows_columns = (x_TAK, dy_TAN) if ctx.transposed else (dy_TAN, x_TAK)
            main_grad = _main_grad(w)
            if main_grad is not None:
                _wgrad(main_grad, *rows_columns, True)
            else:
                dw = w.new_empty(w.shape)
                _wgrad(dw, *rows_columns, False)
        return dx_TAK, dw, None, None


def _main_grad(w: Tensor) -> Tensor | None:
    """The part of `main_grad` that belongs to w, which is a parameter or a view of one; None without a main_grad."""
    for owner in (w, w._base):
        main_grad = getattr(owner, "main_grad", None)
        if owner is not None and main_grad is not None:
            assert main_grad.stride() == owner.stride(), "main_grad is laid out as its parameter"
            offset = main_grad.storage_offset() + w.storage_offset() - owner.storage_offset()
            return main_grad.as_strided(w.shape, w.stride(), offset)
    return None


def _dense(tensor: Tensor) -> Tensor:
    """Steps of 1 in the last dimension; the other strides are free."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def head_gemm(
    x: Tensor,
    w: Tensor,
    *,
    transposed: bool = False,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y[t, a] = x[t, a] @ w[a].T, or x[t, a] @ w[a] with `transposed`: a product per head.

    Args:
        x: [T, A, K], fp32 or bf16. A view such as q[..., :192] is read where it lies (its last dimension must be
            dense, else it is copied).
        w: [A, N, K], the dtype of x, or [A, K, N] with `transposed`. May be a view of a larger weight, dense in
            its last dimension.
        out: [T, A, N], written and returned: a view such as query[..., :512] is welcome. Only where no gradient is
            asked for.
        out_dtype: fp32 or bf16; default the dtype of out, else of x. fp32 inputs have fp32 outputs.

    Returns:
        [T, A, N]: fp32 accumulation by the GEMM tree over K, one rounding. A row's bits do not depend on the other
        rows, on strides, on threads or on the instruction set.

    Raises:
        ValueError: dtypes or shapes that do not fit; a w or out that is not dense in its last dimension; an out whose
            elements overlap, or with gradients.

    Differentiable in x and w. The incoming gradient is rounded to the dtype of x. When w, or the parameter that w is
    a view of, has a `main_grad` (fp32), the gradient is added there and autograd gets None.
    Source: the absorbed products of multi-head latent attention, DeepSeek-AI 2024, arXiv 2405.04434, section 2.1.
    """
    check_model_dtype(x, "x")
    check_dim(x, "x", 3)
    check_dim(w, "w", 3)
    check_same_dtype(w, "w", x.dtype)
    T, A, K = x.shape
    K_dim, N_dim = (1, 2) if transposed else (2, 1)
    if w.shape[0] != A or w.shape[K_dim] != K:
        raise ValueError(
            f"w: expected w.shape[0] == {A} and w.shape[{K_dim}] == {K} (heads and last dimension of x): "
            f"got {list(w.shape)}"
        )
    if w.shape[-1] != 1 and w.stride(-1) != 1:
        raise ValueError(f"w: expected stride 1 in the last dimension: got strides {list(w.stride())}")
    out_dtype = out_dtype or (x.dtype if out is None else out.dtype)
    if out_dtype not in (torch.float32, torch.bfloat16) or (x.dtype == torch.float32 and out_dtype != x.dtype):
        allowed = "torch.float32" if x.dtype == torch.float32 else "torch.float32 or torch.bfloat16"
        raise ValueError(f"out_dtype: expected {allowed} with {x.dtype} inputs: got {out_dtype}")
    shape = (T, A, w.shape[N_dim])
    if out is None:
        out = x.new_empty(shape, dtype=out_dtype)
    else:
        check_same_dtype(out, "out", out_dtype)
        if out.shape != shape:
            raise ValueError(f"out: expected shape {list(shape)}: got {list(out.shape)}")
        if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad or out.requires_grad):
            raise ValueError("out: expected None where a gradient is asked for: got a tensor")
    return apply(HeadGemmFunction, _dense(x), w, transposed, out)
