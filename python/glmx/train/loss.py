"""One micro-batch: forward, losses, backward; and the held-out loss.

    T flat tokens of a micro-batch's packed rows, H hidden, V vocabulary

Both losses are means over the valid targets of the *global* batch: the counts are known before the first
backward, so gradient accumulation needs no correction. Log-probs come from lm_head_logprob (no [T, V] tensor
exists), sums are exact (math.fsum), and the backward starts from hand-made gradients, -1/count per target: no
torch reduction takes part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glmx.train.balance import ExpertLoads, sequence_balance

IGNORE = -1


@dataclass(frozen=True)
class MicroBatch:
    """Packed rows, flattened. Documents are the sequences of `cu_seqlens`; nothing crosses their borders."""

    ids_T: Tensor  # i64
    positions_T: Tensor  # i64, from 0 in every document
    targets_T: Tensor  # i64: the next token, or -1
    next_ids_T: Tensor  # i64: the token the MTP layer embeds (targets, with -1 replaced by a valid id)
    mtp_targets_T: Tensor  # i64: the token after the next, or -1
    cu_seqlens: list[int]  # document borders
    row_lengths: list[int]  # tokens per packed row


@dataclass(frozen=True)
class Denominators:
    """Valid targets of a global batch, and its rows."""

    main: int
    mtp: int
    rows: int

    @classmethod
    def of(cls, micro_batches: Sequence[MicroBatch]) -> Denominators:
        return cls(
            main=sum(int((m.targets_T >= 0).sum()) for m in micro_batches),
            mtp=sum(int((m.mtp_targets_T >= 0).sum()) for m in micro_batches),
            rows=sum(len(m.row_lengths) for m in micro_batches),
        )


@dataclass
class Losses:
    """Means over a global batch in nats; `aux` is the sequence-balance loss, averaged over rows and MoE layers."""

    main: float = 0.0
    mtp: float = 0.0
    aux: float = 0.0


def _nll(model: nn.Module, hidden_TH: Tensor, targets_T: Tensor) -> Tensor:
    from glmx.ops import lm_head_logprob

    return lm_head_logprob(hidden_TH, head_weight(model), targets_T).logprob


def head_weight(model: Any) -> Tensor:
    return model.model.embed_tokens.weight if model.config.tie_word_embeddings else model.lm_head.weight


def exact_sum(x: Tensor) -> float:
    """The correctly rounded sum, whatever the order."""
    return math.fsum(x.detach().flatten().tolist())


def forward_backward(
    model: Any,
    micro: MicroBatch,
    counts: Denominators,
    *,
    mtp_weight: float,
    aux_weight: float,
    losses: Losses,
    loads: ExpertLoads,
) -> None:
    """Accumulates the gradients of one micro-batch and adds its part to `losses` and `loads`."""
    from glmx.models.batch import Batch

    with_mtp = mtp_weight > 0 and model.config.num_nextn_predict_layers > 0
    model.collect_scores = aux_weight > 0
    batch = Batch(micro.cu_seqlens)
    outputs: list[Tensor] = []
    grads: list[Tensor] = []

    hidden_TH = model.forward_tokens(micro.ids_T, micro.positions_T, batch)
    logprob_T = _nll(model, hidden_TH, micro.targets_T)
    outputs.append(logprob_T)
    grads.append(torch.full_like(logprob_T, -1.0 / max(counts.main, 1)))
    losses.main -= exact_sum(logprob_T) / max(counts.main, 1)
    if with_mtp:
        mtp_TH = model.mtp_hidden(hidden_TH, micro.next_ids_T, micro.positions_T, batch)
        logprob_T = _nll(model, mtp_TH, micro.mtp_targets_T)
        outputs.append(logprob_T)
        grads.append(torch.full_like(logprob_T, -mtp_weight / max(counts.mtp, 1)))
        losses.mtp -= exact_sum(logprob_T) / max(counts.mtp, 1)

    stats = list(model.router_stats())
    loads.add([s.expert_counts for s in stats])
    if aux_weight > 0:
        for s in stats:
            value, grad_TE = sequence_balance(s.scores, s.topk_ids, micro.row_lengths)
            losses.aux += value / (counts.rows * len(stats))
            outputs.append(s.scores)
            grads.append(grad_TE * (aux_weight / counts.rows))
    torch.autograd.backward(outputs, grads)


@torch.no_grad()
def heldout_loss(model: Any, micro_batches: Iterable[MicroBatch]) -> tuple[float, int]:
    """(summed negative log-prob in nats, number of targets) of the main head."""
    from glmx.models.batch import Batch

    nats, targets = 0.0, 0
    for micro in micro_batches:
        hidden_TH = model.forward_tokens(micro.ids_T, micro.positions_T, Batch(micro.cu_seqlens))
        nats -= exact_sum(_nll(model, hidden_TH, micro.targets_T))
        targets += int((micro.targets_T >= 0).sum())
    return nats, targets
