"""Acceptance of drafts against a decoder that keeps no cache and looks at one place at a time."""

from __future__ import annotations

import pytest
import torch

from glmx.layers.dsa import Selection
from glmx.models import acceptance
from glmx.models.acceptance import Acceptance, measure
from glmx.models.batch import Batch
from tiny_glm import CASES, FAMILIES, random_ids, random_model, tiny_config

K = 3


def accepted_at(model, text: list[int], drafts: int) -> int:
    """How many drafts a decoder accepts that has written `text`: everything is computed anew, and compared in turn."""
    n = len(text) - 1
    hidden = model.forward_tokens(torch.tensor(text), torch.arange(n + 1), Batch.from_lengths([n + 1]))[:n]
    embedded, given = text[1:], None
    drafted: list[int] = []
    for _ in range(drafts):
        rows = len(embedded)
        step = model.mtp_step(
            hidden, torch.tensor(embedded), torch.arange(rows), Batch.from_lengths([rows]), selection=given
        )
        drafted.append(int(model.logits(step.hidden[-1:]).argmax()))
        embedded = [*embedded, drafted[-1]]
        hidden = torch.cat([hidden, step.hidden[-1:]])
        if model.config.index_share_for_mtp_iteration:
            lists = step.selection.topk_indices  # of the text's rows their own, of drafted rows the last of these
            given = Selection(torch.cat([lists, lists[-1:]]))
    for j, draft in enumerate(drafted):
        logits = model(torch.tensor([text + drafted[:j]])).logits
        if draft != int(logits[0, -1].argmax()):
            return j
    return drafts


@torch.no_grad()
@pytest.mark.parametrize("case", [*FAMILIES, "dsa"])
def test_every_place_is_what_a_decoder_would_do_there(case, monkeypatch):
    # Two tokens, so that a random model's drafts are often its choices; several groups of places.
    monkeypatch.setattr(acceptance, "PLACES", 7)
    model = random_model(tiny_config(**{**CASES[case], "vocab_size": 2}), 6)
    lengths = [20, 1, 2, 9]
    texts = random_ids(model.config, 1, sum(lengths))[0]
    expected = [
        accepted_at(model, text[: p + 1].tolist(), K) for text in texts.split(lengths) for p in range(1, len(text))
    ]
    assert set(expected) == {0, 1, 2, 3}, "a case is missing: choose another seed"
    found = measure(model, [(texts, Batch.from_lengths(lengths))], K)
    assert found == Acceptance(len(expected), tuple(sum(n >= j for n in expected) for j in (1, 2, 3)))
    assert measure(model, [(texts, Batch.from_lengths(lengths))], 1).accepted == found.accepted[:1]


def test_shares_and_tokens_per_step():
    found = Acceptance(8, (6, 3, 1))
    assert found.shares == (0.75, 0.375, 0.125) and found.tokens_per_step == 2.25
    assert Acceptance(0, (0,)).shares == (0.0,) and Acceptance(0, (0,)).tokens_per_step == 1.0


def test_models_and_counts_that_cannot_draft():
    model = random_model(tiny_config(num_nextn_predict_layers=0))
    ids = random_ids(model.config, 1, 4)[0]
    with pytest.raises(ValueError, match="no MTP layer"):
        measure(model, [(ids, Batch.from_lengths([4]))], 1)
    with pytest.raises(ValueError, match="drafts is 0, expected 1 or more"):
        measure(model, [], 0)
