"""Drafts: the MTP layer guesses the next tokens of sequences whose verification the engine then decides.

The layer's entry t is made of the hidden state of token t and of token t+1. What it lacks of a sequence rides in
`Request.held`, so that

    request.mtp_start + state.mtp_lengths[slot] + len(request.held_rows()) == state.lengths[slot]

when drafts are made, with at least one row held. The first draft comes out of the last of these entries; each further
one feeds the layer's own hidden state (after its norm) and the draft before it. Entries made so are guesses too, and
are taken back at once: the next step makes them again from what the decoder has computed.

Legend: T rows, B sequences, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from glmx.models.replay import Replay
from glmx.serve.rules import draw, plain_rules

if TYPE_CHECKING:
    from glmx.serve.engine import Request


class Drafter:
    """The MTP layer of `replay`'s model on the sequences of its state; no forward of it exceeds `max_rows` rows."""

    def __init__(self, replay: Replay, max_rows: int) -> None:
        self.replay, self.state, self.max_rows = replay, replay.state, max_rows
        self._shares_keys = replay.model.config.index_share_for_mtp_iteration

    def prime(self, slot: int, hidden_TH: torch.Tensor, next_ids: Sequence[int]) -> None:
        """Appends the entries of T tokens, each with the id of the token behind it."""
        for start in range(0, len(next_ids), self.max_rows):
            piece = slice(start, start + self.max_rows)
            self.replay.prime(slot, hidden_TH[piece], next_ids[piece])

    def draft(self, requests: Sequence[Request], counts: Sequence[int]) -> list[list[int]]:
        """`counts` drafts for each request; those with some have taken in what they held.

        They are drawn by the rules that the verification follows: with the same random numbers, so that a draft is
        right wherever the two distributions draw the same.
        """
        drafts: list[list[int]] = [[] for _ in requests]
        active = [i for i, count in enumerate(counts) if count]
        if not active:
            return drafts
        share = max(self.max_rows // len(active), 1)
        hidden, next_ids = [], []
        for i in active:
            request = requests[i]
            held_TH = request.held_rows()
            known = request.tokens_from(request.mtp_start + self.state.mtp_lengths[request.slot] + 1)
            head = max(len(known) - share, 0)
            self.prime(request.slot, held_TH[:head], known[:head])
            hidden.append(held_TH[head:])
            next_ids.append(known[head:])
        slots = [requests[i].slot for i in active]
        hidden_TH, lists_Bk = torch.cat(hidden) if len(hidden) > 1 else hidden[0], None
        depth = 0
        while True:
            batch, seen = [requests[i] for i in active], [[depth]] * len(active)
            rules = plain_rules(batch, seen) if all(request.plain for request in batch) else None
            out = self.replay.draft(slots, hidden_TH, next_ids, lists_Bk, rules)
            ids = draw(out.logits, batch, [drafts[i] for i in active], seen) if out.ids is None else out.ids.tolist()
            for i, token in zip(active, ids, strict=True):
                drafts[i].append(token)
            if depth == 0 and self._shares_keys and out.topk_indices is not None:
                lists_Bk = out.topk_indices.clone()
            depth += 1
            on = [b for b, i in enumerate(active) if counts[i] > depth]
            if not on:
                break
            active, slots = [active[b] for b in on], [slots[b] for b in on]
            hidden_TH, next_ids = out.hidden, [[ids[b]] for b in on]
            if len(on) < len(ids):
                rows = torch.tensor(on, device=hidden_TH.device)
                hidden_TH, lists_Bk = hidden_TH[rows], None if lists_Bk is None else lists_Bk[rows]
        for request, count in zip(requests, counts, strict=True):
            if count:
                self.state.truncate_mtp(request.slot, self.state.lengths[request.slot] - request.mtp_start)
        return drafts
