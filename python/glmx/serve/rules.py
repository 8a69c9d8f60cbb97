"""SamplingParams of a batch as the arguments of the ops sample and mtp_verify."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from glmx.serve.engine import Request


def sampling_rules(batch: Sequence[Request], drafts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """For the token behind the drafts of each request: rows [B] of `sample`."""
    rules = _rules(batch, drafts, [[len(ids)] for ids in drafts])
    rules["positions"] = [place + len(ids) for place, ids in zip(rules["positions"], drafts, strict=True)]
    return {name: _first(value) for name, value in rules.items()}


def verification_rules(batch: Sequence[Request], drafts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """For each draft of each request and the token behind them: rows [B, K+1] of `mtp_verify`, K the most drafts."""
    K = max(map(len, drafts))
    return _rules(batch, drafts, [[min(j, len(ids)) for j in range(K + 1)] for ids in drafts])


def _first(value: Any) -> Any:
    return value[:, 0] if isinstance(value, torch.Tensor) and value.dim() > 1 else value


def _rules(batch: Sequence[Request], drafts: Sequence[Sequence[int]], seen: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Rows [B, n]: row j of request b has seen[b][j] of its drafts behind it. Seeds and positions are [B].

    Histories and biases are there only where a request asks for them.
    """
    params = [request.params for request in batch]
    rules: dict[str, Any] = {
        "seeds": [(request.seed + 2**63) % 2**64 - 2**63 for request in batch],  # 64 bits of it, signed
        "positions": [request.num_tokens for request in batch],
    }
    each: dict[str, list[float]] = {
        "temperature": [p.temperature for p in params],
        "top_k": [min(max(p.top_k, 0), 2**31) for p in params],
        "top_p": [max(p.top_p, 1e-30) for p in params],  # what fp32 can hold: one token all the same
        "min_p": [p.min_p for p in params],
    }
    if any(p.penalised for p in params):
        token_ids: list[int] = []
        history = []
        for request, ids, counts in zip(batch, drafts, seen, strict=True):
            begin = len(token_ids)
            if request.params.penalised:
                token_ids += [*request.tokens_from(0), *ids]
                first, end = begin + len(request.prompt_token_ids), begin + request.num_tokens
                history.append([(begin, first, end + count) for count in counts])
            else:
                history.append([(begin, begin, begin)] * len(counts))
        rules |= {"token_ids": torch.tensor(token_ids), "history": torch.tensor(history)}
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            each[name] = [getattr(p, name) for p in params]
    if any(p.logit_bias for p in params):
        bias: list[tuple[int, float]] = []
        spans = []
        for p in params:
            begin = len(bias)
            bias += (p.logit_bias or {}).items()
            spans.append((begin, len(bias)))
        tokens, values = zip(*bias, strict=True)
        rules |= {"bias_ids": torch.tensor(tokens), "bias_values": torch.tensor(values, dtype=torch.float32)}
        rules["bias_spans"] = torch.tensor(spans)[:, None]
    return rules | {name: torch.tensor(values)[:, None] for name, values in each.items()}
