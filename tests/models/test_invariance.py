"""X1 and X2 of the model: a sequence's logits are the same bits whatever stands beside it, and every time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.threads import every_op_shared_out

from glmx.models.batch import Batch
from tiny_glm import CASES, random_ids, random_model, tiny_config

DTYPES = [torch.float32, torch.bfloat16]
MODELS = {dtype: random_model(tiny_config(use_qk_norm=True, attention_bias=True), 1, dtype) for dtype in DTYPES}


def flat_logits(model, sequences):
    batch = Batch.from_lengths([len(ids) for ids in sequences])
    positions = torch.cat([torch.arange(len(ids)) for ids in sequences])
    with torch.no_grad():
        hidden = model.forward_tokens(torch.cat(sequences), positions, batch)
        z = model.mtp_hidden(hidden, torch.cat([ids.roll(-1) for ids in sequences]), positions, batch)
        both = torch.cat([model.logits(hidden), model.logits(z)], -1)
    return both.split(batch.q_lens)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5), place=st.integers(0, 5), n=st.integers(1, 40))
def test_other_sequences_do_not_show(dtype, lengths, place, n):
    model = MODELS[dtype]
    probe = random_ids(model.config, 1, n, seed=n)[0]
    others = [random_ids(model.config, 1, length, seed=1000 + length)[0] for length in lengths]
    place = min(place, len(others))
    alone = flat_logits(model, [probe])[0]
    together = flat_logits(model, [*others[:place], probe, *others[place:]])[place]
    assert torch.equal(alone, together)


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_does_not_show(dtype):
    model, ids = MODELS[dtype], random_ids(MODELS[dtype].config, 3, 20)
    with torch.no_grad():
        out = model(ids, lengths=[7, 20, 0], mtp=True)
        alone = model(ids[:1, :7], mtp=True)
    assert torch.equal(out.logits[0, :7], alone.logits[0]) and torch.equal(out.mtp_logits[0, :7], alone.mtp_logits[0])
    assert not out.logits[0, 7:].any() and not out.logits[2].any()
    assert not out.mtp_logits[0, 6:].any() and not out.mtp_logits[1, 19:].any()
    assert out.logits.shape == out.mtp_logits.shape == (3, 20, model.config.vocab_size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_for_any_thread_count(dtype):
    model, ids = MODELS[dtype], random_ids(MODELS[dtype].config, 3, 33)
    with torch.no_grad():
        first = model(ids).logits
        with every_op_shared_out():
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(model(ids).logits, first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_mode_computes_the_same_bits(dtype):
    """X4's model half: what the trainer runs is what the server runs."""
    model = random_model(tiny_config(**CASES["groups"]), 2, dtype)
    ids = random_ids(model.config, 2, 15)
    with torch.no_grad():
        served = model(ids, mtp=True)
    model.train()
    model.collect_scores = True
    trained = model(ids, mtp=True)
    assert trained.logits.requires_grad
    assert torch.equal(trained.logits, served.logits) and torch.equal(trained.mtp_logits, served.mtp_logits)


def test_logits_to_keep():
    model = MODELS[torch.float32]
    ids = random_ids(model.config, 3, 9)
    with torch.no_grad():
        full = model(ids).logits
        assert torch.equal(model(ids, logits_to_keep=2).logits, full[:, -2:])
        assert torch.equal(model(ids, logits_to_keep=50).logits[:, -9:], full)
        kept = model(ids, lengths=[2, 9, 0], logits_to_keep=3).logits
    assert torch.equal(kept[1], full[1, 6:]) and not kept[2].any()
    # A row of 2 tokens against the first 2 of 9: SDPA (until step 3) promises no more than closeness.
    assert (kept[0, 1:] - full[0, :2]).abs().max() < 2e-5 and not kept[0, 0].any()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m: m(torch.zeros(3).long()), r"int64 \[3\], expected int64 \[B, T\]"),
        (lambda m: m(torch.zeros(1, 3)), "float32"),
        (lambda m: m(torch.zeros(1, 3).long(), lengths=[4]), r"0\.\.3"),
        (lambda m: m(torch.zeros(1, 3).long(), lengths=[1, 2]), "expected 1 values"),
        (lambda m: m(torch.zeros(1, 3).long(), logits_to_keep=-1), "logits_to_keep is -1"),
        (lambda m: m(torch.zeros(1, 3).long(), state=m.new_state(1, 4), mtp=True), "mtp=True"),
        (lambda m: m.forward_tokens(torch.zeros(2).long(), torch.zeros(2), Batch([0, 2])), "positions_T"),
        (lambda m: m.forward_tokens(torch.zeros(2).long(), torch.zeros(2).long(), Batch([0, 3])), "2 rows"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call(MODELS[torch.float32])
