"""grouped_gemm: rows grouped by expert times that expert's weights, its two gradients, and the dense linear (E = 1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glmx.ops._library import apply, check_dim, check_model_dtype, check_same_dtype, op, weight_gradient
from glmx.ops.moe_combine import moe_combine
from glmx.ops.silu_mul import silu_mul_gradient
from glmx.ops.stored_weight import StoredWeight

_forward = op("grouped_gemm")
_stored = op("grouped_gemm_stored")
_dgrad = op("grouped_gemm_dgrad")
_wgrad = op("grouped_gemm_wgrad")
_bias_grad = op("grouped_gemm_bias_grad")


def _experts(w: Tensor) -> Tensor:
    """A dense weight [N, K] as one expert [1, N, K]."""
    return w if w.dim() == 3 else w.unsqueeze(0)


def _bias(bias: Tensor) -> Tensor:
    return bias if bias.dim() == 2 else bias.unsqueeze(0)


class GroupedGemmFunction(torch.autograd.Function):
    """Shapes as in `grouped_gemm`; a dense w [N, K] and bias [N] pass as they are (their `main_grad` is seen), with no
    offsets.
    """

    @staticmethod
    def forward(ctx, x_MK, w_ENK, bias_EN, offsets, row_token_R, inverse_Tk, silu_mul: bool, out_dtype: torch.dtype):
        rows, width = (x_MK if row_token_R is None else row_token_R).shape[0], w_ENK.shape[-2]
        out = x_MK.new_empty((rows, width // 2 if silu_mul else width), dtype=out_dtype)
        preact_RN = x_MK.new_empty((rows, width)) if silu_mul and any(ctx.needs_input_grad) else None
        _forward(out, preact_RN, x_MK, w_ENK, offsets, row_token_R, bias_EN, silu_mul)
        ctx.save_for_backward(x_MK, w_ENK, bias_EN, offsets, row_token_R, inverse_Tk, preact_RN)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x_MK, w_ENK, bias_EN, offsets, row_token_R, inverse_Tk, preact_RN = ctx.saved_tensors
        dy = dy.to(x_MK.dtype).contiguous()
        if offsets is None:
            offsets = torch.arange(2, dtype=torch.int32, device=dy.device) * x_MK.shape[0]
        if preact_RN is not None:
            dy = silu_mul_gradient(dy, preact_RN)
        dx = dw = d_bias = None
        if ctx.needs_input_grad[0]:
            dx = grouped_gemm_dgrad(dy, _experts(w_ENK), offsets)
            if row_token_R is not None:
                dx = moe_combine(dx, None, inverse_Tk)
        if ctx.needs_input_grad[1]:
            dw = _weight_gradient(dy, x_MK, w_ENK, offsets, row_token_R)
        if ctx.needs_input_grad[2]:
            d_bias = weight_gradient(bias_EN, lambda out, add: _bias_grad(_bias(out), dy, offsets, add))
        return dx, dw, d_bias, None, None, None, None, None


def _weight_gradient(dy_RN, x_MK, w_ENK, offsets, row_token_R) -> Tensor | None:
    """Into `main_grad` (fp32, accumulated) when the trainer has set it, else rounded once to the weight's dtype."""
    main_grad = getattr(w_ENK, "main_grad", None)
    if main_grad is not None:
        _wgrad(_experts(main_grad), dy_RN, x_MK, offsets, row_token_R, True)
        return None
    dw = torch.empty_like(w_ENK)
    _wgrad(_experts(dw), dy_RN, x_MK, offsets, row_token_R, False)
    return dw


def _output_dtype(dtype: torch.dtype, out_dtype: torch.dtype | None) -> torch.dtype:
    out_dtype = out_dtype or dtype
    if out_dtype not in (torch.float32, torch.bfloat16) or (dtype == torch.float32 and out_dtype != dtype):
        allowed = "torch.float32" if dtype == torch.float32 else "torch.float32 or torch.bfloat16"
        raise ValueError(f"out_dtype: expected {allowed} with {dtype} inputs: got {out_dtype}")
    return out_dtype


def _times_stored(
    x_MK: Tensor,
    w: StoredWeight,
    offsets: Tensor | None,
    row_token_R: Tensor | None,
    bias_EN: Tensor | None,
    silu_mul: bool,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """`grouped_gemm` of contiguous arguments; what is wrong with a bias's dtype the op says."""
    rows, N = (x_MK if row_token_R is None else row_token_R).shape[0], w.shape[1]
    out = x_MK.new_empty((rows, N // 2 if silu_mul else N), dtype=_output_dtype(x_MK.dtype, out_dtype))
    bias_EN = _contiguous(bias_EN)
    _stored(out, x_MK.contiguous(), w.table, *w.codes, N, offsets, row_token_R, bias_EN, silu_mul)
    return out


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def grouped_gemm(
    x: Tensor,
    w: Tensor | StoredWeight,
    expert_offsets: Tensor,
    *,
    row_token: Tensor | None = None,
    inverse: Tensor | None = None,
    bias: Tensor | None = None,
    silu_mul: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """out[r] = x[token(r)] @ w[e].T + bias[e] for the rows r of each expert e; with silu_mul, its SwiGLU.

    Args:
        x: [M, K], fp32 or bf16.
        w: [E, N, K], the dtype of x. With silu_mul, gate rows [0, N/2) come before up rows. Or a StoredWeight, whose
            docstring says what its formats mean; then x is bf16 and nothing is differentiable.
        expert_offsets: int32 [E+1], ascending from 0: expert e has the rows [offsets[e], offsets[e+1]).
        row_token: int32 [R]: row r reads x[row_token[r]]; None: row r reads x[r], R = M. From `expert_plan`.
        inverse: int32 [M, k] from `expert_plan`: needed for the gradient of x when row_token is given.
        bias: [E, N], the dtype of x, added in fp32.
        silu_mul: return silu(gate) * up, [R, N/2], from the fp32 accumulators, rounded once.
        out_dtype: fp32 or bf16; default the dtype of x. fp32 inputs have fp32 outputs.

    Returns:
        [R, N], or [R, N/2] with silu_mul. Rows at and past expert_offsets[E] are zero. A row's bits do not depend on
        the other rows, on threads or on the instruction set (the GEMM tree of csrc/include/glmx/ops.h).

    Raises:
        ValueError: dtypes or shapes that do not fit, offsets that descend or pass R, a row_token outside [0, M).

    Differentiable in x, w and bias. The incoming gradient is rounded to the dtype of x; `w.main_grad` and
    `bias.main_grad` (fp32), when set, receive the gradient and autograd gets None. With silu_mul the backward uses
    the pre-activations rounded to the dtype of x, which the forward keeps.
    Source: the expert products of Shazeer et al. 2017, arXiv 1701.06538; SwiGLU: Shazeer 2020, arXiv 2002.05202.
    """
    check_model_dtype(x, "x")
    check_dim(x, "x", 2)
    if isinstance(w, StoredWeight):
        w.check("w", x, parts=2 if silu_mul else 1)
    else:
        check_dim(w, "w", 3)
        check_same_dtype(w, "w", x.dtype)
    if w.shape[2] != x.shape[1]:
        raise ValueError(f"w: expected w.shape[2] == K: got {w.shape[2]}, K is {x.shape[1]} (x.shape[1])")
    if bias is not None and bias.shape != w.shape[:2]:
        raise ValueError(f"bias: expected shape {list(w.shape[:2])} (w.shape[:2]): got {list(bias.shape)}")
    if isinstance(w, StoredWeight):
        if expert_offsets.shape != (w.shape[0] + 1,):
            raise ValueError(
                f"expert_offsets: expected shape [{w.shape[0] + 1}] (E + 1): got {list(expert_offsets.shape)}"
            )
        return _times_stored(x, w, expert_offsets.contiguous(), _contiguous(row_token), bias, silu_mul, out_dtype)
    if row_token is not None and x.requires_grad and torch.is_grad_enabled():
        if inverse is None:
            raise ValueError("inverse: expected a tensor, for the gradient of x through row_token: got None")
        if inverse.dim() != 2 or inverse.shape[0] != x.shape[0]:
            raise ValueError(f"inverse: expected shape [x.shape[0] == {x.shape[0]}, k]: got {list(inverse.shape)}")
    out_dtype = _output_dtype(x.dtype, out_dtype)
    x, w, bias, row_token = x.contiguous(), w.contiguous(), _contiguous(bias), _contiguous(row_token)
    offsets = expert_offsets.contiguous()
    return apply(GroupedGemmFunction, x, w, bias, offsets, row_token, inverse, silu_mul, out_dtype)


def grouped_gemm_dgrad(
    dy: Tensor, w: Tensor, expert_offsets: Tensor, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """dx[r] = dy[r] @ w[e]: the gradient of grouped_gemm's input rows.

    Args:
        dy: [R, N], fp32 or bf16. w: [E, N, K], the same dtype. expert_offsets: int32 [E+1].
        out_dtype: fp32 or bf16; default the dtype of dy.

    Returns:
        [R, K]; rows at and past expert_offsets[E] are zero. Reduced over N by the GEMM tree. Not differentiable.

    Raises:
        ValueError: as grouped_gemm.
    """
    check_model_dtype(dy, "dy")
    check_dim(w, "w", 3)
    check_same_dtype(w, "w", dy.dtype)
    dx = dy.new_empty(dy.shape[0], w.shape[2], dtype=_output_dtype(dy.dtype, out_dtype))
    _dgrad(dx, dy.contiguous(), w.contiguous(), expert_offsets.contiguous())
    return dx


def grouped_gemm_wgrad(
    dy: Tensor,
    x: Tensor,
    expert_offsets: Tensor,
    *,
    row_token: Tensor | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """dw[e] = dy[rows of e].T @ x[token(rows of e)]: the gradient of grouped_gemm's weights.

    Args:
        dy: [R, N], fp32 or bf16. x: [M, K], the same dtype. expert_offsets: int32 [E+1].
        row_token: int32 [R], as in grouped_gemm; None: R = M.
        out: [E, N, K], contiguous, fp32 or bf16, written in place and returned; default: a new tensor of out_dtype.
        accumulate: out += dw, in fp32; experts without rows are left alone. Without it they get zeros.
        out_dtype: fp32 or bf16; default the dtype of out, else of dy.

    Returns:
        [E, N, K]. Reduced over each expert's rows by the GEMM tree. Not differentiable.

    Raises:
        ValueError: as grouped_gemm; accumulate without an fp32 out.
    """
    check_model_dtype(dy, "dy")
    check_dim(dy, "dy", 2)
    check_dim(x, "x", 2)
    check_same_dtype(x, "x", dy.dtype)
    if accumulate and out is None:
        raise ValueError("out: expected a tensor to accumulate into: got None")
    if out is None:
        shape = (expert_offsets.shape[0] - 1, dy.shape[1], x.shape[1])
        out = dy.new_empty(shape, dtype=_output_dtype(dy.dtype, out_dtype))
    elif out_dtype not in (None, out.dtype):
        raise ValueError(f"out_dtype: expected the dtype of out, {out.dtype}: got {out_dtype}")
    _wgrad(out, dy.contiguous(), x.contiguous(), expert_offsets.contiguous(), _contiguous(row_token), accumulate)
    return out


def linear(
    x: Tensor,
    w: Tensor | StoredWeight,
    bias: Tensor | None = None,
    *,
    silu_mul: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x @ w.T + bias: grouped_gemm with one expert; with silu_mul, its SwiGLU.

    Args:
        x: [..., K], fp32 or bf16. w: [N, K] and bias: [N], the dtype of x. Or w: a StoredWeight [1, N, K], as in
            grouped_gemm.
        silu_mul: return silu(gate) * up, as in grouped_gemm; w then holds the gate rows before the up rows.
        out_dtype: fp32 or bf16; default the dtype of x. fp32 inputs have fp32 outputs.

    Returns:
        [..., N], or [..., N/2] with silu_mul; fp32 accumulation by the GEMM tree, one rounding.

    Raises:
        ValueError: dtypes or shapes that do not fit.

    Differentiable in x, w and bias, as grouped_gemm.
    """
    check_model_dtype(x, "x")
    if isinstance(w, StoredWeight):
        w.check("w", x, parts=2 if silu_mul else 1)
        if w.shape[0] != 1:
            raise ValueError(f"w: expected one expert's weights: got {w}")
    else:
        check_dim(w, "w", 2)
        check_same_dtype(w, "w", x.dtype)
    N, K = w.shape[-2:]
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"w: expected w.shape[-1] == x.shape[-1]: got {list(w.shape)}, x is {list(x.shape)}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias: expected shape [{N}] (w.shape[-2]): got {list(bias.shape)}")
    rows = (x if x.dim() == 2 else x.reshape(-1, K)).contiguous()
    if isinstance(w, StoredWeight):
        out = _times_stored(rows, w, None, None, None if bias is None else bias.view(1, N), silu_mul, out_dtype)
    else:
        args = rows, w.contiguous(), _contiguous(bias), None, None, None, silu_mul, _output_dtype(x.dtype, out_dtype)
        out = apply(GroupedGemmFunction, *args)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1])
