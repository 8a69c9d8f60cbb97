"""sample: one token from each row of logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glmx.ops._library import check_same_dtype, op

_forward = op("sample")
Values = float | Sequence[float] | Tensor  # one for all rows, or a shape that broadcasts to the rows
DRAW_TARGET, DRAW_ACCEPT, DRAW_RESIDUAL, DRAW_DRAFT = range(4)
# The least fp32 above 0. What is smaller still must not become 0, which of a temperature would mean greedy.
_LEAST = 2.0**-149
_NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def sample(
    logits: Tensor,
    *,
    seeds: Values,
    positions: Values,
    temperature: Values = 1.0,
    top_k: Values = 0,
    top_p: Values = 1.0,
    min_p: Values = 0.0,
    token_ids: Tensor | None = None,
    history: Tensor | None = None,
    repetition_penalty: Values | None = None,
    presence_penalty: Values | None = None,
    frequency_penalty: Values | None = None,
    bias_ids: Tensor | None = None,
    bias_values: Tensor | None = None,
    bias_spans: Tensor | None = None,
    draw: int = DRAW_TARGET,
) -> Tensor:
    """Draws a token for each row: a function of its logits, its rules, its seed and its position alone.

    An argument of rows is one value, or has a shape that broadcasts to logits.shape[:-1], such as [B, K+1].

    Args:
        logits: fp32 [..., V], V up to 2^20.
        seeds: int64, and positions: int64, the index in its sequence of the token that is drawn.
        temperature: 0 (greedy: the largest logit, ties to the lower id) or 1e-30 to 1e30.
        top_k: keep the k largest logits, ties to the lower id; 0 keeps all.
        top_p: keep the most likely tokens up to this part of what the other two leave, in (0, 1].
        min_p: keep tokens at least this likely in relation to the most likely one, in [0, 1].
        token_ids: int64 [N] in [0, V), and history: int64 [..., 3]: a row's earlier tokens are token_ids[begin:end],
            of which those from `first` on were generated, as (begin, first, end). Spans of rows may overlap: the row of
            a draft has one token more than the row before it.
        repetition_penalty: > 0: logits of tokens in the history, if positive, are divided by it, else multiplied.
        presence_penalty, frequency_penalty: taken from the logits of generated tokens, once, and once per occurrence.
        bias_ids: int64 [M] in [0, V), bias_values: fp32 [M], and bias_spans: int64 [..., 2]: the row adds
            bias_values[begin:end] to the logits of bias_ids[begin:end], before everything else.
        draw: which of the random numbers of (seed, position) to use: DRAW_TARGET, or DRAW_DRAFT for a drafter's own.

    Returns:
        ids int64 [...]. The order is bias, penalties, temperature, min-p, top-k, top-p. The kept sets are exact in the
        order (logit descending, id ascending; -0 as +0, NaN as -inf), whatever their size.

    Raises:
        ValueError: dtypes or shapes that do not fit, or a value outside its range, with the row.

    No gradient: a draw has none. Source: csrc/include/glmx/ops.h states the rule; names and the order are vLLM's.
    """
    lead = _lead(logits)
    rules = rule_tensors(
        logits,
        seeds=seeds,
        positions=positions,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        token_ids=token_ids,
        history=history,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        bias_ids=bias_ids,
        bias_values=bias_values,
        bias_spans=bias_spans,
    )
    flat_RV = logits.detach().reshape(-1, logits.shape[-1]).contiguous()
    ids_R = logits.new_empty(flat_RV.shape[0], dtype=torch.int64)
    _forward(ids_R, flat_RV, *rules, draw)
    return ids_R.view(lead)


def _lead(logits: Tensor) -> torch.Size:
    check_same_dtype(logits, "logits", torch.float32)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits: expected shape [..., V] with V >= 1: got {list(logits.shape)}")
    return logits.shape[:-1]


def per_row(value: Any, name: str, lead: torch.Size, dtype: torch.dtype, *width: int) -> Tensor:
    """The values of every row, flat. Integers are not made from fractions, and 0 is not made from small numbers."""
    tensor = value if isinstance(value, Tensor) and value.dtype is dtype else _converted(value, name, dtype)
    if len(lead) == 1 and tensor.shape == (*lead, *width):
        return tensor.contiguous()
    try:
        spread = tensor.broadcast_to((*lead, *width))
    except RuntimeError:
        want = [*lead, *width]
        raise ValueError(f"{name}: expected a shape that broadcasts to {want}: got {list(tensor.shape)}") from None
    return spread.reshape(lead.numel(), *width).contiguous()


def _converted(value: Any, name: str, dtype: torch.dtype) -> Tensor:
    floating = dtype.is_floating_point
    try:
        if isinstance(value, int) or (isinstance(value, float) and floating):
            number = math.copysign(_LEAST, value) if 0 < abs(value) < _LEAST else value
            return torch.full((), number, dtype=dtype)
        given = isinstance(value, Tensor) or not floating
        tensor = torch.as_tensor(value) if given else torch.as_tensor(value, dtype=torch.float64)
    except (OverflowError, RuntimeError, ValueError):  # which of them differs with the type and with lists
        raise ValueError(f"{name}: expected values that {dtype} holds: got {value}") from None
    if tensor.is_floating_point() and not floating and tensor.numel() > 0:
        raise ValueError(f"{name}: expected integers: got {tensor.dtype}")
    if tensor.dtype is torch.float64:
        small = (tensor != 0) & (tensor.abs() < _LEAST)
        tensor = torch.where(small, torch.full_like(tensor, _LEAST).copysign(tensor), tensor)
    return tensor.to(dtype)


def rule_tensors(logits: Tensor, **given: Any) -> list[Tensor | None]:
    """The arguments that sample and mtp_verify share, in the order of their torch ops."""
    lead, i64, f32 = _lead(logits), torch.int64, torch.float32
    rules: list[Tensor | None] = [
        per_row(given["seeds"], "seeds", lead, i64),
        per_row(given["positions"], "positions", lead, i64),
        per_row(given["temperature"], "temperature", lead, f32),
        per_row(given["top_k"], "top_k", lead, i64),
        per_row(given["top_p"], "top_p", lead, f32),
        per_row(given["min_p"], "min_p", lead, f32),
    ]
    history, bias_spans = given["history"], given["bias_spans"]
    if history is None:
        for name in ("token_ids", *_NEUTRAL):
            if given[name] is not None:
                raise ValueError(f"{name}: expected a history with it: got none")
        rules += [None] * 5
    else:
        rules += [given["token_ids"], per_row(history, "history", lead, i64, 3)]
        for name, neutral in _NEUTRAL.items():
            rules.append(per_row(neutral if given[name] is None else given[name], name, lead, f32))
    if bias_spans is not None:
        bias_spans = per_row(bias_spans, "bias_spans", lead, i64, 2)
    return [*rules, given["bias_ids"], given["bias_values"], bias_spans]
