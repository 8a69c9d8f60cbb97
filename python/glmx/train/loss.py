"""One micro-batch: forward, losses, backward; and the held-out loss.

    T flat tokens of a micro-batch's packed rows, H hidden, V vocabulary

Both losses are means over the valid targets of the *global* batch: the counts are known before the first
backward, so gradient accumulation needs no correction. Log-probs come from lm_head_logprob (no [T, V] tensor
exists), sums are exact (math.fsum), and the backward starts from hand-made gradients, -1/count per target: no
torch reduction takes part. The same goes for the indexers' KL, a mean over the tokens of each layer; the MTP layer's
leaves out tokens whose next one is not known, for what it attends with there is made up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from glmx.train.balance import ExpertLoads, sequence_balance

if TYPE_CHECKING:
    from glmx.data.packing import PackedBatch
    from glmx.models.decoder import Decoder


@dataclass(frozen=True)
class Denominators:
    """Valid targets of a global batch, its rows of seq_len tokens, and its tokens."""

    main: int
    mtp: int
    rows: int
    tokens: int

    @classmethod
    def of(cls, micro_batches: Sequence[PackedBatch], seq_len: int) -> Denominators:
        return cls(
            main=sum(int((m.targets >= 0).sum()) for m in micro_batches),
            mtp=sum(int((m.mtp_targets >= 0).sum()) for m in micro_batches),
            rows=sum(m.num_tokens for m in micro_batches) // seq_len,
            tokens=sum(m.num_tokens for m in micro_batches),
        )


@dataclass
class Losses:
    """Means over a global batch, in nats; `aux` is the sequence-balance loss, averaged over rows and MoE
    layers, `indexer_kl` the indexers' divergence, averaged over tokens and DSA layers.
    """

    main: float = 0.0
    mtp: float = 0.0
    aux: float = 0.0
    indexer_kl: float = 0.0


def exact_sum(x: Tensor) -> float:
    """The correctly rounded sum, whatever the order."""
    return math.fsum(x.detach().flatten().tolist())


def target_logprobs(model: Decoder, hidden_TH: Tensor, targets_T: Tensor) -> Tensor:
    """fp32 [T], 0 where the target is -1."""
    from glmx.ops import lm_head_logprob

    return lm_head_logprob(hidden_TH, model.lm_head.weight, targets_T).logprob


def forward_backward(
    model: Decoder,
    micro: PackedBatch,
    counts: Denominators,
    *,
    seq_len: int,
    mtp_weight: float,
    aux_weight: float,
    kl_weight: float = 0.0,
    losses: Losses,
    loads: ExpertLoads,
) -> None:
    """Accumulates the gradients of one micro-batch and adds its part to `losses` and `loads`.

    A `kl_weight` goes with model.collect_kl. Losses that no trained parameter has part in are measured all the same.
    """
    from glmx.models.batch import Batch

    batch = Batch(micro.cu_seqlens)
    outputs: list[Tensor] = []
    grads: list[Tensor] = []

    hidden_TH = model.forward_tokens(micro.ids, micro.positions, batch)
    logprob_T = target_logprobs(model, hidden_TH, micro.targets)
    outputs.append(logprob_T)
    grads.append(torch.full_like(logprob_T, -1.0 / max(counts.main, 1)))
    losses.main -= exact_sum(logprob_T) / max(counts.main, 1)
    num_layers = len(model.indexer_kl())
    if mtp_weight:
        mtp_TH = model.mtp_hidden(hidden_TH, micro.next_ids, micro.positions, batch)
        logprob_T = target_logprobs(model, mtp_TH, micro.mtp_targets)
        outputs.append(logprob_T)
        grads.append(torch.full_like(logprob_T, -mtp_weight / max(counts.mtp, 1)))
        losses.mtp -= exact_sum(logprob_T) / max(counts.mtp, 1)

    stats = model.router_stats()
    loads.add([s.expert_counts for s in stats])
    for s in stats if aux_weight else ():
        assert s.scores is not None and s.topk_ids is not None
        value, grad_TE = sequence_balance(s.scores, s.topk_ids, [seq_len] * (micro.num_tokens // seq_len))
        losses.aux += value / (counts.rows * len(stats))
        outputs.append(s.scores)
        grads.append(grad_TE * (aux_weight / counts.rows))

    kls = model.indexer_kl() if kl_weight else []
    for layer, kl_T in enumerate(kls):
        mask_T, count = torch.ones_like(kl_T), counts.tokens
        if layer >= num_layers:  # the MTP layer
            mask_T, count = (micro.targets >= 0).to(kl_T), max(counts.main, 1)
        losses.indexer_kl += exact_sum(kl_T.detach() * mask_T) / (count * len(kls))
        outputs.append(kl_T)
        grads.append(mask_T * (kl_weight / count))

    trained = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
    torch.autograd.backward([output for output, _ in trained], [grad for _, grad in trained])


@torch.no_grad()
def heldout_nats(model: Decoder, micro: PackedBatch) -> float:
    """Summed negative log-prob of a micro-batch's targets under the main head."""
    from glmx.models.batch import Batch

    hidden_TH = model.forward_tokens(micro.ids, micro.positions, Batch(micro.cu_seqlens))
    return -exact_sum(target_logprobs(model, hidden_TH, micro.targets))
