"""moe_combine: expert rows back to tokens, weighted, in the order of k."""

from __future__ import annotations

import torch
from torch import Tensor

from glmx.ops._library import apply, check_dim, check_model_dtype, check_same_dtype, op

_forward = op("moe_combine")
_backward = op("moe_combine_backward")


class MoeCombineFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RH: Tensor, weights_TK: Tensor | None, inverse_TK: Tensor) -> Tensor:
        out_TH = rows_RH.new_empty(inverse_TK.shape[0], rows_RH.shape[1])
        _forward(out_TH, rows_RH, weights_TK, inverse_TK)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(rows_RH, weights_TK, inverse_TK)
        return out_TH

    @staticmethod
    def backward(ctx, d_out_TH: Tensor):
        rows_RH, weights_TK, inverse_TK = ctx.saved_tensors
        d_rows_RH = torch.empty_like(rows_RH)
        d_weights_TK = torch.empty_like(weights_TK) if ctx.needs_input_grad[1] else None
        _backward(d_rows_RH, d_weights_TK, d_out_TH.contiguous(), rows_RH, weights_TK, inverse_TK)
        return d_rows_RH, d_weights_TK, None


def moe_combine(rows: Tensor, topk_weights: Tensor | None, inverse: Tensor) -> Tensor:
    """out[t] = sum over k of topk_weights[t, k] * rows[inverse[t, k]].

    Args:
        rows: [R, H], fp32 or bf16: the experts' outputs, in the order of `expert_plan`.
        topk_weights: fp32 [T, K], or None: every weight is 1.
        inverse: int32 [T, K] from `expert_plan`: the row of each pair, or -1, which adds nothing.

    Returns:
        [T, H] in the dtype of rows. The sum is fp32 (fused multiply-adds from zero, k ascending) and rounded once.

    Raises:
        ValueError: dtypes or shapes that do not fit, a row outside [-1, R), and in the backward
            a row that two pairs name.

    Differentiable in rows and topk_weights. Rows that no pair names get a gradient of zero.
    """
    check_model_dtype(rows, "rows")
    check_dim(rows, "rows", 2)
    check_dim(inverse, "inverse", 2)
    check_same_dtype(inverse, "inverse", torch.int32)
    if topk_weights is not None:
        check_same_dtype(topk_weights, "topk_weights", torch.float32)
        if topk_weights.shape != inverse.shape:
            raise ValueError(f"topk_weights: expected shape {list(inverse.shape)}: got {list(topk_weights.shape)}")
        topk_weights = topk_weights.contiguous()
    return apply(MoeCombineFunction, rows.contiguous(), topk_weights, inverse.contiguous())
