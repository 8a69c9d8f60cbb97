"""embedding: rows of a table by id."""

from __future__ import annotations

import torch
from torch import Tensor

from glmx.ops._library import apply, check_dim, check_model_dtype, check_same_dtype, op, weight_gradient

_forward = op("embedding")
_backward = op("embedding_backward")


class EmbeddingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids_T: Tensor, weight_VH: Tensor) -> Tensor:
        y_TH = weight_VH.new_empty(ids_T.shape[0], weight_VH.shape[1])
        _forward(y_TH, ids_T, weight_VH)
        ctx.save_for_backward(ids_T, weight_VH)
        return y_TH

    @staticmethod
    def backward(ctx, dy_TH: Tensor):
        ids_T, weight_VH = ctx.saved_tensors
        dy_TH = dy_TH.contiguous()
        return None, weight_gradient(weight_VH, lambda out, add: _backward(out, ids_T, dy_TH, add))


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """y[t] = weight[ids[t]].

    Args:
        ids: int64 [T], each in [0, V).
        weight: [V, H], fp32 or bf16, contiguous.

    Returns:
        [T, H] in the dtype of weight: copies.

    Raises:
        ValueError: dtypes or shapes that do not fit, an id outside [0, V).

    Differentiable in weight: a row's gradient is the fp32 sum over its tokens, in token order, rounded once
    (`weight.main_grad`, when set, receives it instead).
    """
    check_dim(ids, "ids", 1)
    check_same_dtype(ids, "ids", torch.int64)
    check_dim(weight, "weight", 2)
    check_model_dtype(weight, "weight")
    return apply(EmbeddingFunction, ids.contiguous(), weight)
