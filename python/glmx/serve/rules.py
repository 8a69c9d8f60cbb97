"""SamplingParams of a batch as the arguments of the ops sample and mtp_verify."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from glmx.serve.engine import Request


def sampling_rules(batch: Sequence[Request], drafts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """For the token behind the drafts of each request: rows [B] of `sample`."""
    rules = _rules(batch, drafts, [[len(ids)] for ids in drafts], None)
    places = [request.num_tokens + len(ids) for request, ids in zip(batch, drafts, strict=True)]
    rules["positions"] = torch.tensor(places)
    return rules


def verification_rules(batch: Sequence[Request], drafts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """For each draft of each request and the token behind them: rows [B, K+1] of `mtp_verify`, K the most drafts."""
    K = max(map(len, drafts))
    rules = _rules(batch, drafts, [[min(j, len(ids)) for j in range(K + 1)] for ids in drafts], K + 1)
    rules["positions"] = torch.tensor([request.num_tokens for request in batch])
    return rules


@lru_cache(maxsize=256)
def _cutoffs(rows: tuple[tuple[int, float, int, float, float], ...], width: int | None) -> dict[str, torch.Tensor]:
    """What holds for as long as the same requests run: seeds [B], and cutoffs [B] or [B, width]."""
    seeds, *columns = zip(*rows, strict=True)
    out = {"seeds": torch.tensor([(seed + 2**63) % 2**64 - 2**63 for seed in seeds])}  # 64 bits of it, signed
    names = {"temperature": torch.float32, "top_k": torch.int64, "top_p": torch.float32, "min_p": torch.float32}
    for (name, dtype), values in zip(names.items(), columns, strict=True):
        out[name] = _spread(torch.tensor(values, dtype=dtype), width)
    return out


def _spread(values_B: torch.Tensor, width: int | None) -> torch.Tensor:
    return values_B if width is None else values_B[:, None].expand(-1, width).contiguous()


def _rules(
    batch: Sequence[Request], drafts: Sequence[Sequence[int]], seen: Sequence[Sequence[int]], width: int | None
) -> dict[str, Any]:
    """Rows [B, width], or [B] with None: row j of request b has seen[b][j] of its drafts behind it.

    Histories and biases are there only where a request asks for them.
    """
    params = [request.params for request in batch]
    rules: dict[str, Any] = dict(
        _cutoffs(
            tuple(
                # top_p: what fp32 can hold is one token all the same
                (r.seed, p.temperature, min(max(p.top_k, 0), 2**31), max(p.top_p, 1e-30), p.min_p)
                for r, p in zip(batch, params, strict=True)
            ),
            width,
        )
    )
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
        if width is None:
            rules["history"] = rules["history"][:, 0]
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            each = torch.tensor([getattr(p, name) for p in params], dtype=torch.float32)
            rules[name] = _spread(each, width)
    if any(p.logit_bias for p in params):
        bias: list[tuple[int, float]] = []
        bounds = []
        for p in params:
            begin = len(bias)
            bias += (p.logit_bias or {}).items()
            bounds.append((begin, len(bias)))
        tokens, values = zip(*bias, strict=True)
        rules |= {"bias_ids": torch.tensor(tokens), "bias_values": torch.tensor(values, dtype=torch.float32)}
        spans_B2 = torch.tensor(bounds)
        rules["bias_spans"] = spans_B2 if width is None else spans_B2[:, None]
    return rules
