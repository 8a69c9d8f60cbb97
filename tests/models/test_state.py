"""The cache: prefill and decode against the full forward, bit for bit; truncate, fork and free."""

from __future__ import annotations

import pytest
import torch

from glmx.models.batch import Batch
from tiny_glm import CASES, random_ids, random_model, tiny_config


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 1, 5], [3, 9], [11, 1]])
@pytest.mark.parametrize("case", ["plain", "qk_norm_bias", "groups"])
def test_chunks_equal_the_full_forward(case, chunks):
    model = random_model(tiny_config(**CASES[case]), 1)
    ids = random_ids(model.config, 2, 12)
    full, state = model(ids).logits, model.new_state(2, 12)
    parts = [model(piece, state=state).logits for piece in ids.split(chunks, dim=1)]
    assert torch.equal(torch.cat(parts, 1), full)
    assert state.lengths == [12, 12]


def test_rows_continue_at_their_own_lengths():
    model = random_model(tiny_config(), 2)
    ids, state = random_ids(model.config, 2, 9), model.new_state(2, 9)
    model(ids[:, :6], lengths=[2, 6], state=state)
    assert state.lengths == [2, 6]
    new = torch.stack([ids[0, 2:5], ids[1, 6:9]])
    logits = model(new, state=state).logits
    full = model(ids).logits
    assert torch.equal(logits[0], full[0, 2:5])
    assert torch.equal(logits[1], full[1, 6:9])


def test_truncate_then_continue():
    model = random_model(tiny_config(), 3)
    ids, state = random_ids(model.config, 1, 10), model.new_state(1, 10)
    model(random_ids(model.config, 1, 10, seed=9), state=state)
    state.truncate(0, 0)
    model(torch.cat([ids[:, :4], random_ids(model.config, 1, 5, seed=8)], 1), state=state)
    state.truncate(0, 4)
    assert state.lengths == [4]
    assert torch.equal(model(ids[:, 4:], state=state).logits, model(ids).logits[:, 4:])


def test_fork_shares_the_past_and_not_the_future():
    model = random_model(tiny_config(), 4)
    ids, state = random_ids(model.config, 2, 8), model.new_state(3, 8)
    ids[1, :5] = ids[0, :5]
    model(ids[:1, :5], state=state)
    assert state.fork(0) == 1 and state.lengths == [5, 5, 0]
    logits = model(ids[:, 5:], state=state).logits
    assert torch.equal(logits, model(ids).logits[:, 5:])
    assert state.fork(1) == 2
    with pytest.raises(ValueError, match="no free sequence"):
        state.fork(0)
    state.free(1)
    assert state.lengths == [8, 0, 8] and state.allocate() == 1


def test_a_freed_slot_forgets():
    model = random_model(tiny_config(), 5)
    ids, state = random_ids(model.config, 1, 6), model.new_state(1, 6)
    model(random_ids(model.config, 1, 6, seed=7), state=state)
    state.free(0)
    assert torch.equal(model(ids, state=state).logits, model(ids).logits)


def test_the_mtp_layer_has_its_own_lengths():
    model = random_model(tiny_config(), 6)
    ids, T = random_ids(model.config, 1, 10)[0], 9
    positions = torch.arange(T)
    hidden = model.forward_tokens(ids[:T], positions, Batch.from_lengths([T]))
    full = model.mtp_hidden(hidden, ids[1:], positions, Batch.from_lengths([T]))
    state = model.new_state(1, 10)

    def step(a, b):
        batch = Batch([0, b - a], [b], [0])
        return model.mtp_hidden(hidden[a:b], ids[a + 1 : b + 1], positions[a:b], batch, state)

    state.allocate()
    model.forward_tokens(ids[:T], positions, Batch([0, T], [T], [0]), state)
    parts = [step(0, 4), step(4, 5), step(5, T)]
    assert torch.equal(torch.cat(parts), full)
    assert state.lengths == [T] and state.mtp_lengths == [T]
    state.truncate(0, T)
    assert state.mtp_lengths == [T]
    state.truncate(0, 6)  # MTP entry 5 was made with token 6, which is gone
    assert state.lengths == [6] and state.mtp_lengths == [5]
    assert torch.equal(step(5, T), full[5:])
    copy = model.new_state(2, 10)
    copy.allocate()
    model.forward_tokens(ids[:T], positions, Batch([0, T], [T], [0]), copy)
    model.mtp_hidden(hidden, ids[1:], positions, Batch([0, T], [T], [0]), copy)
    assert copy.fork(0) == 1 and copy.mtp_lengths == [T, T]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m, s: m(random_ids(m.config, 1, 9), state=s), "would have 12 tokens, the state holds 8"),
        (lambda m, s: m(random_ids(m.config, 3, 1), state=s), "3 rows, the state 2"),
        (lambda m, s: s.truncate(0, 4), "<= 3, sequence 0's: got 4"),
        (lambda m, s: s.truncate(1, 0), "sequence 1 is not live"),
        (lambda m, s: s.free(7), "sequence 7 is not live"),
        (lambda m, s: s.fork(-1), "sequence -1 is not live"),
        (
            lambda m, s: m.forward_tokens(torch.zeros(1).long(), torch.zeros(1).long(), Batch([0, 1]), s),
            "needs a batch with seq_ids",
        ),
        (
            lambda m, s: m.forward_tokens(torch.zeros(1).long(), torch.zeros(1).long(), Batch([0, 1], [9], [0]), s),
            "holds 3 tokens, the batch says 8",
        ),
        (lambda m, s: m.new_state(0, 4), "num_sequences"),
    ],
)
def test_errors(call, words):
    model = random_model(tiny_config(), 0)
    state = model.new_state(2, 8)
    model(random_ids(model.config, 1, 3), state=state)
    with pytest.raises(ValueError, match=words):
        call(model, state)
    assert state.lengths == [3, 0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (([1, 2],), "start at 0"),
        (([0, 3, 2],), "ascend"),
        (([0, 2], [1]), "below the query lengths"),
        (([0, 2], [2, 2]), "1 sequences: got 2"),
        (([0, 1, 2], [1, 1], [0, 0]), "names? a slot twice"),
    ],
)
def test_batch_errors(arguments, words):
    with pytest.raises(ValueError, match=words):
        Batch(*arguments)


def test_pages_are_shared_and_given_back():
    """A prefix of two pages and a bit: forks share the full pages, and every page comes back."""
    model = random_model(tiny_config(), 8)
    ids, state = random_ids(model.config, 2, 140), model.new_state(3, 192)
    ids[1, :130] = ids[0, :130]
    model(ids[:1, :130], state=state)
    assert state.fork(0) == 1 and state.pages.in_use == 3
    logits = model(ids[:, 130:], state=state).logits
    assert torch.equal(logits, model(ids).logits[:, 130:])
    assert state.pages.in_use == 4, "the third page is each sequence's own now, the first two are shared"
    state.truncate(1, 100)  # a shared page is written next: the other must not see it
    new = random_ids(model.config, 1, 20, seed=3)[0]
    model.forward_tokens(new, torch.arange(100, 120), Batch([0, 20], [120], [1]), state)
    more = random_ids(model.config, 1, 5, seed=4)
    whole = model(torch.cat([ids[:1], more], 1)).logits[:, 140:]
    assert torch.equal(model(more, state=state).logits, whole)
    for seq in (0, 1):
        state.free(seq)
    assert state.pages.in_use == 0


def test_a_forward_that_failed_leaves_its_pages_for_the_next():
    model = random_model(tiny_config(), 9)
    ids, state = random_ids(model.config, 1, 70), model.new_state(1, 80)
    state.begin(Batch([0, 70], [70], [0]), state.lengths)
    assert state.lengths == [0] and state.pages.in_use == 2
    assert torch.equal(model(ids, state=state).logits, model(ids).logits) and state.pages.in_use == 2
    state.free(0)
    assert state.pages.in_use == 0
