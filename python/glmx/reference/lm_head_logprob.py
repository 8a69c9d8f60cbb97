"""Oracle of lm_head_logprob: the log-prob of given ids under softmax(hidden @ weight.T / temperature)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from glmx.reference.route_topk import first_k

F64 = torch.float64


class LogProbs(NamedTuple):
    """logprob [T], lse [T] (natural log), top_ids int32 [T, n], top_logprobs [T, n]."""

    logprob: torch.Tensor
    lse: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


def lm_head_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_n: int = 0,
    exact: bool = False,
) -> LogProbs:
    """hidden [T, H], weight [V, H], ids [T] int64 -> LogProbs. An id of -1 is ignored: logprob 0, no
    gradient.

    lse is that of the tempered logits: logprob = logit / temperature - lse. The top n come in descending
    order, ties to the lower id.
    """
    logits = hidden.to(F64) @ weight.to(F64).T / temperature
    lse = torch.logsumexp(logits, dim=1)
    chosen = torch.gather(logits, 1, ids.clamp(min=0)[:, None])[:, 0] - lse
    logprob = torch.where(ids >= 0, chosen, torch.zeros((), dtype=F64))
    top = first_k(logits.detach(), top_n)
    top_logprobs = torch.gather(logits, 1, top).detach() - lse.detach()[:, None]
    if exact:
        return LogProbs(logprob, lse, top.int(), top_logprobs)
    return LogProbs(logprob.float(), lse.float(), top.int(), top_logprobs.float())
