"""lm_head_logprob: log-probabilities of given ids straight from hidden states, without a [T, V] tensor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glmx.ops._library import apply, check_dim, check_model_dtype, check_same_dtype, op, weight_gradient

_forward = op("lm_head_logprob")
_backward = op("lm_head_logprob_backward")


class LogProbs(NamedTuple):
    """logprob fp32 [T], lse fp32 [T] (natural log), top_ids int32 [T, n], top_logprobs fp32 [T, n]."""

    logprob: Tensor
    lse: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


class LmHeadLogprobFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH: Tensor, weight_VH: Tensor, ids_T: Tensor, temperature: float, top_n: int):
        ctx.set_materialize_grads(False)
        T = hidden_TH.shape[0]
        logprob_T = torch.empty(T, dtype=torch.float32, device=hidden_TH.device)
        lse_T = torch.empty_like(logprob_T)
        top_ids = torch.empty(T, top_n, dtype=torch.int32, device=hidden_TH.device)
        top_logprobs = torch.empty(T, top_n, dtype=torch.float32, device=hidden_TH.device)
        _forward(logprob_T, lse_T, top_ids, top_logprobs, hidden_TH, weight_VH, ids_T, temperature)
        ctx.save_for_backward(hidden_TH, weight_VH, ids_T, lse_T)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(top_ids, top_logprobs)
        return logprob_T, lse_T, top_ids, top_logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logprob_T: Tensor | None, d_lse_T: Tensor | None, *_):
        hidden_TH, weight_VH, ids_T, lse_T = ctx.saved_tensors
        if d_logprob_T is None and d_lse_T is None:
            return None, None, None, None, None
        d_logprob_T = torch.zeros_like(lse_T) if d_logprob_T is None else d_logprob_T.contiguous()
        d_lse_T = None if d_lse_T is None else d_lse_T.contiguous()
        inputs = (d_logprob_T, d_lse_T, hidden_TH, weight_VH, ids_T, lse_T, ctx.temperature)
        d_hidden = torch.empty_like(hidden_TH, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = weight_gradient(weight_VH, lambda out, add: _backward(d_hidden, out, *inputs, add))
        else:
            _backward(d_hidden, None, *inputs, False)
        return None if d_hidden is None else d_hidden.to(hidden_TH.dtype), d_weight, None, None, None


def lm_head_logprob(
    hidden: Tensor, weight: Tensor, ids: Tensor, *, temperature: float = 1.0, top_n: int = 0
) -> LogProbs:
    """The log-probability of ids[t] under softmax(hidden[t] @ weight.T / temperature).

    Args:
        hidden: [T, H], fp32 or bf16.
        weight: [V, H], the dtype of hidden: the LM head (or the tied embedding).
        ids: [T] int64, each in [0, V), or -1: ignored, its logprob is 0 and has no gradient.
        temperature: > 0; logits are multiplied by the fp32 1 / temperature.
        top_n: how many of the most probable ids to return, at most V.

    Returns:
        LogProbs: logprob fp32 [T]; lse fp32 [T], the natural log of the sum of exp of the tempered logits;
        top_ids int32 [T, top_n] in descending order, ties to the lower id (NaN counts as -inf), and their
        top_logprobs fp32 [T, top_n]. Logits are fp32, made and consumed in chunks of 1024 columns. A token's results
        do not depend on the other tokens, on threads or on the instruction set. Infinite logits give NaN.

    Raises:
        ValueError: dtypes or shapes that do not fit, an id outside [-1, V), a temperature or top_n out of range.

    Differentiable in hidden and weight through logprob and lse (not through the top). d_logits are recomputed from the
    hidden states and rounded to their dtype; `weight.main_grad`, when set, receives the weight's gradient. Tokens
    without a gradient cost nothing in the backward.
    """
    check_model_dtype(hidden, "hidden")
    check_dim(hidden, "hidden", 2)
    check_same_dtype(weight, "weight", hidden.dtype)
    check_same_dtype(ids, "ids", torch.int64)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight: expected shape [V, hidden.shape[1]]: got {list(weight.shape)}, {list(hidden.shape)}")
    if ids.shape != hidden.shape[:1]:
        raise ValueError(
            f"ids: expected shape [hidden.shape[0]]: got {list(ids.shape)}, hidden is {list(hidden.shape)}"
        )
    if not 0 <= top_n <= weight.shape[0]:
        raise ValueError(f"top_n: expected 0 <= top_n <= weight.shape[0] == {weight.shape[0]}: got {top_n}")
    out = apply(
        LmHeadLogprobFunction, hidden.contiguous(), weight.contiguous(), ids.contiguous(), float(temperature), top_n
    )
    return LogProbs(*out)
