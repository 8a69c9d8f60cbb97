"""Oracle of mtp_verify: chains of drafts judged row by row, by the rule of csrc/include/glmx/ops.h, bit for bit."""

from __future__ import annotations

from typing import NamedTuple

import torch

from glmx.reference.gemm_tree import F64, flush32
from glmx.reference.sample import DRAW_ACCEPT, DRAW_RESIDUAL, ONE, Kept, Rules, Values, coin, drawn


class Verified(NamedTuple):
    tokens: torch.Tensor
    accepted: torch.Tensor
    packed_ids: torch.Tensor
    packed_offsets: torch.Tensor


def judged(kept: Kept, draft: int, q_V: torch.Tensor | None, accept: int, residual: int, size: int) -> int:
    """The draft, if it is accepted, else the token in its place. accept, residual: coins of 24 bits."""
    mass = torch.zeros(size, dtype=torch.int64).index_put((kept.ids,), kept.mass)
    if q_V is None:
        q_V = torch.zeros(size).index_fill(0, torch.tensor([draft]), 1.0)
    q = flush32(torch.where(q_V > 0, q_V, 0.0).to(F64))
    total = float(int(mass.sum())) / ONE
    if accept * 2.0**-24 * float(q[draft]) * total < int(mass[draft]) / ONE:
        return draft
    rest = (((mass.to(F64) / ONE - q * total).clamp(min=0) + 1024.0 - 1024.0) * ONE).long()
    everything = torch.arange(size)
    return drawn(Kept(everything, rest if int(rest.sum()) else mass), residual)


def mtp_verify(
    draft_ids: torch.Tensor,
    logits: torch.Tensor,
    *,
    seeds: Values,
    positions: Values,
    mode: str = "sample",
    draft_probs: torch.Tensor | None = None,
    temperature: Values = 1.0,
    top_k: Values = 0,
    top_p: Values = 1.0,
    min_p: Values = 0.0,
    token_ids: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
    repetition_penalty: Values | None = None,
    presence_penalty: Values | None = None,
    frequency_penalty: Values | None = None,
    bias_ids: torch.Tensor | None = None,
    bias_values: torch.Tensor | None = None,
    bias_spans: torch.Tensor | None = None,
    row_offsets: torch.Tensor | None = None,
) -> Verified:
    """draft_ids [B, K], logits [B, K+1, V] -> Verified; the arguments as in glmx.ops.mtp_verify."""
    given = dict(locals())
    V = logits.shape[-1]
    if row_offsets is None:
        B, K = draft_ids.shape
        bounds, drafts_at = [b * (K + 1) for b in range(B + 1)], [b * K for b in range(B)]
        seeds_R = torch.as_tensor(seeds).broadcast_to(B).repeat_interleave(K + 1).tolist()
        positions_R = (torch.as_tensor(positions).broadcast_to(B)[:, None] + torch.arange(K + 1)).flatten().tolist()
    else:
        bounds = row_offsets.tolist()
        B, drafts_at = len(bounds) - 1, bounds
        seeds_R, positions_R = (torch.as_tensor(x).broadcast_to(bounds[-1]).tolist() for x in (seeds, positions))
    R, drafts, probs = bounds[-1], draft_ids.flatten(), None if draft_probs is None else draft_probs.reshape(-1, V)
    if mode == "greedy":
        given["temperature"] = 0.0
    rules = Rules(given.pop("logits"), **given)
    kept = rules.kept(logits)
    tokens_R = torch.full((R,), -1)
    accepted_B = torch.zeros(B, dtype=torch.int64)
    for b in range(B):
        for r in range(bounds[b], bounds[b + 1]):
            place = drafts_at[b] + r - bounds[b]
            draft = int(drafts[place]) if r + 1 < bounds[b + 1] else -1
            flip = lambda draw, r=r: coin(seeds_R[r], positions_R[r], draw)
            if mode == "rejection" and draft >= 0:
                q = None if probs is None else probs[place]
                token = judged(kept[r], draft, q, flip(DRAW_ACCEPT), flip(DRAW_RESIDUAL), V)
            else:
                token = drawn(kept[r], flip(0))
            tokens_R[r] = token
            if token != draft:
                break
            accepted_B[b] += 1
    packed = torch.full((R,), -1)
    emitted = tokens_R[tokens_R >= 0]
    packed[: len(emitted)] = emitted
    offsets = torch.zeros(B + 1, dtype=torch.int32)
    offsets[1:] = (accepted_B + 1).cumsum(0)
    return Verified(tokens_R.view(logits.shape[:-1]), accepted_B, packed, offsets)
