"""SamplingParams of a batch as the arguments of the op sample: one row per request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from glmx.serve.engine import Request


def sampling_rules(batch: Sequence[Request]) -> dict[str, Any]:
    """For the next token of each request. Histories and biases are there only where a request asks for them."""
    params = [request.params for request in batch]
    rules: dict[str, Any] = {
        "seeds": [(request.seed + 2**63) % 2**64 - 2**63 for request in batch],  # 64 bits of it, signed
        "positions": [request.num_tokens for request in batch],
        "temperature": [p.temperature for p in params],
        "top_k": [min(max(p.top_k, 0), 2**31) for p in params],
        "top_p": [max(p.top_p, 1e-30) for p in params],  # what fp32 can hold: one token all the same
        "min_p": [p.min_p for p in params],
    }
    if any(p.penalised for p in params):
        token_ids: list[int] = []
        history = []
        for request in batch:
            begin = len(token_ids)
            if request.params.penalised:
                token_ids += request.tokens_from(0)
            history.append((begin, min(begin + len(request.prompt_token_ids), len(token_ids)), len(token_ids)))
        rules |= {"token_ids": torch.tensor(token_ids), "history": torch.tensor(history)}
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            rules[name] = [getattr(p, name) for p in params]
    if any(p.logit_bias for p in params):
        bias: list[tuple[int, float]] = []
        spans = []
        for p in params:
            begin = len(bias)
            bias += (p.logit_bias or {}).items()
            spans.append((begin, len(bias)))
        tokens, values = zip(*bias, strict=True)
        rules |= {"bias_ids": torch.tensor(tokens), "bias_values": torch.tensor(values, dtype=torch.float32)}
        rules["bias_spans"] = torch.tensor(spans)
    return rules
