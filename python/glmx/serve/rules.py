"""SamplingParams of a batch as what the ops sample and mtp_verify draw their rows by.

`seen` says which rows: row (b, n), for each n in seen[b], draws the token behind the first n drafts of request b. The
rows of a batch lie one behind the other. Tokens are drawn on the CPU: no GPU has kernels for it yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from glmx import ops
from glmx.models.replay import RULES, Rules

if TYPE_CHECKING:
    from glmx.serve.engine import Request

Seen = Sequence[Sequence[int]]


def draw(logits_RV: torch.Tensor, batch: Sequence[Request], drafts: Sequence[Sequence[int]], seen: Seen) -> list[int]:
    """The token of each row, by its request's parameters and by its place in the sequence."""
    return ops.sample(logits_RV.cpu(), **_columns(batch, drafts, seen)).tolist()


def verify(logits_RV: torch.Tensor, batch: Sequence[Request], drafts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens behind each request and its drafts, as `draw` would have them; -1 behind a wrong draft."""
    ids = torch.tensor([i for guesses in drafts for i in (*guesses, -1)])
    ends = torch.tensor([0, *accumulate(len(guesses) + 1 for guesses in drafts)], dtype=torch.int32)
    columns = _columns(batch, drafts, [range(len(guesses) + 1) for guesses in drafts])
    return ops.mtp_verify(ids, logits_RV.cpu(), **columns, row_offsets=ends).tokens.tolist()


def _columns(batch: Sequence[Request], drafts: Sequence[Sequence[int]], seen: Seen) -> dict[str, Any]:
    rules = plain_rules(batch, seen)
    longs, floats = torch.tensor(rules.longs).view(3, -1), torch.tensor(rules.floats, dtype=torch.float32).view(3, -1)
    columns = dict(zip(RULES, [*longs, *floats], strict=True))
    if any(request.params.penalised for request in batch):
        columns |= _histories(batch, drafts, seen)
    if any(request.params.logit_bias for request in batch):
        columns |= _biases(batch, seen)
    return columns


def plain_rules(batch: Sequence[Request], seen: Seen) -> Rules:
    """All but histories and biases, which Request.plain ones have none of."""
    positions: list[int] = []
    rows = []
    for request, counts in zip(batch, seen, strict=True):
        place = request.num_tokens
        positions += [place + n for n in counts]
        rows += [request.rule] * len(counts)
    seeds, top_k, temperature, top_p, min_p = zip(*rows, strict=True)
    return Rules([*seeds, *positions, *top_k], [*temperature, *top_p, *min_p])


def _histories(batch: Sequence[Request], drafts: Sequence[Sequence[int]], seen: Seen) -> dict[str, Any]:
    token_ids: list[int] = []
    history = []
    for request, ids, counts in zip(batch, drafts, seen, strict=True):
        begin = len(token_ids)
        if request.params.penalised:
            token_ids += [*request.tokens_from(0), *ids]
            first, end = begin + len(request.prompt_token_ids), begin + request.num_tokens
            history += [(begin, first, end + n) for n in counts]
        else:
            history += [(begin, begin, begin)] * len(counts)
    out = {"token_ids": torch.tensor(token_ids), "history": torch.tensor(history)}
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        each = [getattr(r.params, name) for r, counts in zip(batch, seen, strict=True) for _ in counts]
        out[name] = torch.tensor(each, dtype=torch.float32)
    return out


def _biases(batch: Sequence[Request], seen: Seen) -> dict[str, Any]:
    bias: list[tuple[int, float]] = []
    spans = []
    for request, counts in zip(batch, seen, strict=True):
        begin = len(bias)
        bias += (request.params.logit_bias or {}).items()
        spans += [(begin, len(bias))] * len(counts)
    ids, values = zip(*bias, strict=True)
    return {
        "bias_ids": torch.tensor(ids),
        "bias_values": torch.tensor(values, dtype=torch.float32),
        "bias_spans": torch.tensor(spans),
    }
