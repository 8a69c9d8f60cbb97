"""How well a model predicts text it is given: nats, and bits per byte of the text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from glmx import ops
from glmx.models.batch import Batch
from glmx.models.decoder import Decoder

if TYPE_CHECKING:
    from glmx.data.packing import PackedBatch


@dataclass(frozen=True)
class Likelihood:
    """Negative log-prob of `targets` tokens under the main head, in nats, and the bytes of text that they stand for."""

    nats: float
    targets: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / max(self.targets, 1)

    @property
    def bits_per_byte(self) -> float | None:
        """None where the bytes are not known."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None


@torch.no_grad()
def measure(model: Decoder, batches: Iterable[PackedBatch], byte_lengths: torch.Tensor | None) -> Likelihood:
    """Over the targets of all batches that are not -1. `byte_lengths` [V]: the bytes of text of each token."""
    nats, targets, size = [], 0, 0
    for batch in batches:
        there = batch.to(model.device)
        hidden_TH = model.forward_tokens(there.ids, there.positions, Batch(batch.cu_seqlens))
        logprob_T = ops.lm_head_logprob(hidden_TH, model.lm_head.weight, there.targets).logprob
        nats.append(-math.fsum(logprob_T.tolist()))  # correctly rounded, whatever the order
        scored = batch.targets[batch.targets >= 0]
        targets += scored.numel()
        if byte_lengths is not None:
            size += int(byte_lengths[scored].sum())
    return Likelihood(math.fsum(nats), targets, size)
