"""One micro-batch: forward, losses, backward.

    T flat tokens of a micro-batch's packed rows, H hidden, V vocabulary, S steps of the MTP layer

The losses are means over the valid targets of the *global* batch: the counts are known before the first
backward, so gradient accumulation needs no correction. Log-probs come from lm_head_logprob (no [T, V] tensor
exists), sums are exact (math.fsum), and the backward starts from hand-made gradients, -1/count per target: no
torch reduction takes part. The same goes for the indexers' KL, a mean over the tokens of each layer.

The MTP layer is applied S times with the same weights (GLM-5, 2.1): row t of step s reads its own hidden state of the
step before, after the norm (in step 1 the model's), and the token s ahead, attends to the rows of its own step, and
predicts the token s + 1 ahead. The steps are one layer that ran S times: whatever counts per layer (its loss, balance
loss and KL) is their mean, and the loads of its experts are their sum. Rows whose token s ahead is not in the document
come last in it, so no row with a target sees them; their attention is made up, and the KL leaves them out. (The loads
and the balance loss do not.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from glmx.train.balance import ExpertLoads, sequence_balance

if TYPE_CHECKING:
    from glmx.data.packing import PackedBatch
    from glmx.layers.moe import RouterStats
    from glmx.models.batch import Batch
    from glmx.models.decoder import Decoder

X = TypeVar("X")


@dataclass(frozen=True)
class Denominators:
    """Valid targets of a global batch (of the MTP layer: of each step), its rows of seq_len tokens, and its tokens."""

    main: int
    mtp: tuple[int, ...]
    rows: int
    tokens: int

    @classmethod
    def of(cls, micro_batches: Sequence[PackedBatch], seq_len: int) -> Denominators:
        later = [(m.mtp_targets >= 0).sum(1).tolist() for m in micro_batches]
        return cls(
            main=sum(int((m.targets >= 0).sum()) for m in micro_batches),
            mtp=tuple(map(sum, zip(*later, strict=True))),
            rows=sum(m.num_tokens for m in micro_batches) // seq_len,
            tokens=sum(m.num_tokens for m in micro_batches),
        )


@dataclass
class Losses:
    """Means over a global batch, in nats; `mtp` of each step of the MTP layer (empty until one has run), `aux` the
    sequence-balance loss, averaged over rows and MoE layers, `indexer_kl` the indexers' divergence, averaged over
    tokens and DSA layers.
    """

    main: float = 0.0
    mtp: list[float] = field(default_factory=list)
    aux: float = 0.0
    indexer_kl: float = 0.0

    @property
    def mtp_mean(self) -> float:
        return math.fsum(self.mtp) / max(len(self.mtp), 1)


def exact_sum(x: Tensor) -> float:
    """The correctly rounded sum, whatever the order."""
    return math.fsum(x.detach().flatten().tolist())


def target_logprobs(model: Decoder, hidden_TH: Tensor, targets_T: Tensor) -> Tensor:
    """fp32 [T], 0 where the target is -1."""
    from glmx.ops import lm_head_logprob

    return lm_head_logprob(hidden_TH, model.lm_head.weight, targets_T).logprob


class MTPPass(NamedTuple):
    """One step of the MTP layer: its hidden states [T, H], what its router left, and its indexer where it has one."""

    hidden_TH: Tensor
    stats: list[RouterStats]
    kls: list[Tensor]


def mtp_passes(model: Decoder, hidden_TH: Tensor, micro: PackedBatch, batch: Batch) -> list[MTPPass]:
    """Applies the MTP layer once for every step that `micro` has targets for, behind forward_tokens' `hidden_TH`.

    With config.index_share_for_mtp_iteration the steps behind the first attend to the keys that the first selected.
    """
    num_stats, num_kls = len(model.router_stats()), len(model.indexer_kl())
    passes: list[MTPPass] = []
    selection = None
    for s, next_ids_T in enumerate(micro.next_ids):
        step = model.mtp_step(hidden_TH, next_ids_T, micro.positions + s, batch, selection=selection)
        if model.config.index_share_for_mtp_iteration:
            selection = step.selection
        hidden_TH = step.hidden
        passes.append(MTPPass(hidden_TH, model.router_stats()[num_stats:], model.indexer_kl()[num_kls:]))
    return passes


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

    batch, micro = Batch(micro.cu_seqlens), micro.to(model.device)
    outputs: list[Tensor] = []
    grads: list[Tensor] = []

    hidden_TH = model.forward_tokens(micro.ids, micro.positions, batch)
    stats, kls = model.router_stats(), model.indexer_kl()
    passes = mtp_passes(model, hidden_TH, micro, batch) if mtp_weight else []
    S = max(len(passes), 1)

    logprob_T = target_logprobs(model, hidden_TH, micro.targets)
    outputs.append(logprob_T)
    grads.append(torch.full_like(logprob_T, -1.0 / max(counts.main, 1)))
    losses.main -= exact_sum(logprob_T) / max(counts.main, 1)
    losses.mtp = losses.mtp or [0.0] * len(passes)
    for s, (step, targets_T) in enumerate(zip(passes, micro.mtp_targets, strict=False)):
        count = max(counts.mtp[s], 1)
        logprob_T = target_logprobs(model, step.hidden_TH, targets_T)
        outputs.append(logprob_T)
        grads.append(torch.full_like(logprob_T, -mtp_weight / (count * S)))
        losses.mtp[s] -= exact_sum(logprob_T) / count

    routed = _runs(stats, [step.stats for step in passes])
    loads.add([torch.stack([run.expert_counts for run in runs]).sum(0) for runs in routed])
    for runs in routed if aux_weight else ():
        for run in runs:
            assert run.scores is not None and run.topk_ids is not None
            value, grad_TE = sequence_balance(run.scores, run.topk_ids, [seq_len] * (micro.num_tokens // seq_len))
            losses.aux += value / (counts.rows * len(routed) * len(runs))
            outputs.append(run.scores)
            grads.append(grad_TE * (aux_weight / (counts.rows * len(runs))))

    selecting = _runs(kls, [step.kls for step in passes]) if kl_weight else []
    for layer, kl_runs in enumerate(selecting):
        for s, kl_T in enumerate(kl_runs):
            mask_T, count = torch.ones_like(kl_T), counts.tokens
            if layer >= len(kls):  # the MTP layer: what it embeds in a step is the target of the step before
                known_T = micro.mtp_targets[s - 1] if s else micro.targets
                mask_T, count = (known_T >= 0).to(kl_T), max(counts.mtp[s - 1] if s else counts.main, 1)
            losses.indexer_kl += exact_sum(kl_T.detach() * mask_T) / (count * len(selecting) * len(kl_runs))
            outputs.append(kl_T)
            grads.append(mask_T * (kl_weight / (count * len(kl_runs))))

    trained = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
    torch.autograd.backward([output for output, _ in trained], [grad for _, grad in trained])


def _runs(trunk: list[X], passes: list[list[X]]) -> list[list[X]]:
    """What each run of each layer left: the model's layers ran once, the MTP layer, the last, in every pass."""
    return [[x] for x in trunk] + [list(runs) for runs in zip(*passes, strict=True)]
