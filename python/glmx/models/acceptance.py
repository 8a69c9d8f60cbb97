"""How many of the MTP layer's drafts greedy speculative decoding accepts, measured on given text.

A place of a text x is a decoder that has written x_0 .. x_p so far (p >= 1). The main model has run to x_p-1, the MTP
layer over the pairs (h_t, x_t+1) up to (h_p-1, x_p). Drafting, greedily, is decoding's: draft 1 is what that last row
predicts; every further step reads the layer's own hidden state of the step before and the draft it made, as one more
row of the layer's cache (with config.index_share_for_mtp_iteration it attends to the keys that the last row selected).
Then the main model runs over x_p and the drafts. Draft j is accepted when it and all drafts before it are the main
model's greedy choices, each made behind the text so far and the drafts before it. So a place says what decoding would
do there, exactly; what the text goes on with plays no part, but that the next place is one token further.

Legend: T tokens, H hidden, B places computed together, K drafts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from glmx.layers.dsa import Selection
from glmx.models.batch import Batch
from glmx.models.decoder import Decoder

PLACES = 64  # computed together: each holds a page of its own in every layer's cache


@dataclass(frozen=True)
class Acceptance:
    """Of `places`, `accepted[j - 1]` are those at which drafts 1 .. j are all accepted."""

    places: int
    accepted: tuple[int, ...]

    @property
    def shares(self) -> tuple[float, ...]:
        """The same as shares of all places: what is left at each draft position."""
        return tuple(count / max(self.places, 1) for count in self.accepted)

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens that one forward of the main model yields: the accepted drafts and its own next token."""
        return 1 + sum(self.accepted) / max(self.places, 1)


@torch.no_grad()
def measure(model: Decoder, texts: Iterable[tuple[torch.Tensor, Batch]], drafts: int) -> Acceptance:
    """texts: (ids int64 [T], Batch of whole sequences); every place of each counts. `model` is in eval mode and has an
    MTP layer (ValueError without one).
    """
    if drafts < 1:
        raise ValueError(f"drafts is {drafts}, expected 1 or more")
    places, accepted_K = 0, torch.zeros(drafts, dtype=torch.int64, device=model.device)
    for ids_T, batch in texts:
        for text_T in ids_T.to(model.device).split(batch.q_lens):
            places += max(len(text_T) - 1, 0)
            accepted_K += _accepted(model, text_T, drafts)
    return Acceptance(places, tuple(accepted_K.tolist()))


def _accepted(model: Decoder, ids_T: torch.Tensor, drafts: int) -> torch.Tensor:
    """int64 [K]: at how many places of one text so many drafts are accepted."""
    T, positions_T = len(ids_T), torch.arange(len(ids_T), device=ids_T.device)
    total_K = torch.zeros(drafts, dtype=torch.int64, device=ids_T.device)
    if T < 2:
        return total_K
    state = model.new_state(1 + PLACES, T + drafts)
    whole = state.allocate()
    hidden_TH = model.forward_tokens(ids_T, positions_T, Batch([0, T], [T], [whole]), state)
    # Row p - 1 is the last one of place p; it drafts the token behind x_p.
    first = model.mtp_step(hidden_TH[:-1], ids_T[1:], positions_T[:-1], Batch([0, T - 1], [T - 1], [whole]), state)
    for place_B in positions_T[1:].split(PLACES):
        B, ends = len(place_B), place_B.tolist()
        forks = [state.fork(whole) for _ in ends]
        for fork, p in zip(forks, ends, strict=True):
            state.truncate(fork, p + 1)  # x_0 .. x_p, and the MTP layer's rows up to p - 1
        hidden_BH, selection = first.hidden[place_B - 1], None
        if model.config.index_share_for_mtp_iteration and first.selection is not None:
            lists_Tk = first.selection.topk_indices
            selection = Selection(None if lists_Tk is None else lists_Tk[place_B - 1])
        drafted = [_greedy(model, hidden_BH)]
        for j in range(1, drafts):
            batch = Batch(range(B + 1), [p + j for p in ends], forks)
            hidden_BH = model.mtp_step(hidden_BH, drafted[-1], place_B + (j - 1), batch, state, selection).hidden
            drafted.append(_greedy(model, hidden_BH))
        drafts_BK = torch.stack(drafted, 1)

        chosen_BK = _greedy(model, hidden_TH[place_B])[:, None]
        if drafts > 1:
            batch = Batch(range(0, B * (drafts - 1) + 1, drafts - 1), [p + drafts for p in ends], forks)
            behind_BK = place_B[:, None] + torch.arange(1, drafts, device=ids_T.device)
            verified_RH = model.forward_tokens(drafts_BK[:, :-1].flatten(), behind_BK.flatten(), batch, state)
            chosen_BK = torch.cat([chosen_BK, _greedy(model, verified_RH).view(B, -1)], 1)
        total_K += (drafts_BK == chosen_BK).long().cumprod(1).sum(0)
        for fork in forks:
            state.free(fork)
    return total_K


def _greedy(model: Decoder, hidden_RH: torch.Tensor) -> torch.Tensor:
    return model.logits(hidden_RH).argmax(-1)
