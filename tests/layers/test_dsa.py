"""DSA layers: who selects, who shares, what the dense warm-up and the indexer's loss do to the rest of the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from glmx import ops
from glmx.layers.dsa import Selection
from glmx.models.batch import Batch
from glmx.models.decoder import Decoder
from tiny_glm import CASES, random_ids, random_model, tiny_config

SHARED = tiny_config(**CASES["dsa_shared"])  # full, shared, full, shared; 6 keys of up to 24
T = 24


def with_config(model, **changes):
    """The same weights under a changed config."""
    other = Decoder(replace(model.config, **changes), model.dtype)
    other.load_state_dict(model.state_dict())
    return other.eval()


def test_shared_layers_have_no_indexer_and_leave_no_index_keys():
    model = random_model(SHARED, 1)
    indexers = [layer.self_attn.indexer is not None for layer in model.model.layers]
    assert indexers == [True, False, True, False, True], "the MTP layer has its own"
    planes = [sorted(layer.planes) for layer in model.new_state(1, 8).layers]
    assert planes == [["index_k", "kv"] if own else ["kv"] for own in indexers]


@torch.no_grad()
def test_shared_layers_attend_to_the_list_before_them(monkeypatch):
    model, ids = random_model(SHARED, 2), random_ids(SHARED, 2, T)
    made, used = [], []
    select, attend = ops.indexer_topk, ops.sparse_mla
    monkeypatch.setattr(ops, "indexer_topk", lambda *a, **k: made.append(select(*a, **k)) or made[-1])
    monkeypatch.setattr(ops, "sparse_mla", lambda q, kv, lists, **k: used.append(lists) or attend(q, kv, lists, **k))
    model(ids)
    assert len(made) == 2 and not torch.equal(*made)
    assert [next(i for i, m in enumerate(made) if m is lists) for lists in used] == [0, 0, 1, 1]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_crossing_index_topk_does_not_show(dtype):
    """A list of every key gives the bits of no list at all, so a batch may mix short and long contexts."""
    model = random_model(SHARED, 3, dtype)
    short, long = random_ids(SHARED, 1, SHARED.index_topk)[0], random_ids(SHARED, 1, T, seed=1)[0]
    alone = model(short[None]).logits[0]
    batch = Batch.from_lengths([len(short), T])
    positions = torch.cat([torch.arange(len(short)), torch.arange(T)])
    hidden = model.forward_tokens(torch.cat([short, long]), positions, batch)
    assert torch.equal(model.logits(hidden[: len(short)]), alone)
    dense = with_config(model, index_topk=T)
    always = with_config(model, index_topk=T)
    for layer in always.model.layers:
        layer.self_attn.always_lists = True
    assert torch.equal(always(long[None], mtp=True).mtp_logits, dense(long[None], mtp=True).mtp_logits)
    assert not torch.equal(model(long[None]).logits, dense(long[None]).logits), "nothing was sparse: this tests nothing"


@torch.no_grad()
def test_a_later_draft_step_reuses_the_list_and_writes_its_index_keys(monkeypatch):
    """index_share_for_mtp_iteration: step 0 selects, further steps attend to the same keys."""
    model, ids = random_model(SHARED, 4), random_ids(SHARED, 1, T + 3)[0]
    positions, batch = torch.arange(T), Batch.from_lengths([T])
    hidden = model.forward_tokens(ids[:T], positions, batch)
    first = model.mtp_step(hidden, ids[1 : T + 1], positions, batch)
    lists = first.selection.topk_indices
    assert lists.shape == (T, SHARED.index_topk) and (lists[0, 1:] == -1).all()
    assert torch.equal(first.hidden, model.mtp_hidden(hidden, ids[1 : T + 1], positions, batch))

    def draft(selection):
        state = model.new_state(1, T + 3)
        state.allocate()
        seen = Batch([0, T], [T], [0])
        second = model.mtp_step(first.hidden, ids[2 : T + 2], positions + 1, seen, state, selection)
        return second, state.layers[-1].planes["index_k"]

    reused, index_k = draft(first.selection)
    assert reused.selection is first.selection
    own, own_index_k = draft(None)
    assert torch.equal(index_k, own_index_k) and index_k[:T].any()
    assert not torch.equal(own.hidden, reused.hidden)
    monkeypatch.setattr(ops, "indexer_topk", lambda *a, **k: lists)
    assert torch.equal(draft(None)[0].hidden, reused.hidden)


def test_a_short_context_has_a_list_to_reuse_too():
    """Else what a short sequence reuses would depend on how long the others in its batch are."""
    model, n = random_model(SHARED, 5), 3
    ids, batch = random_ids(SHARED, 1, n + 1)[0], Batch.from_lengths([n])
    with torch.no_grad():
        hidden = model.forward_tokens(ids[:n], torch.arange(n), batch)
        step = model.mtp_step(hidden, ids[1:], torch.arange(n), batch)
    assert step.selection.topk_indices.tolist() == [[0, -1, -1], [0, 1, -1], [0, 1, 2]]


def test_a_shared_layer_needs_a_selection():
    layer = random_model(SHARED, 6).model.layers[1].self_attn
    with pytest.raises(ValueError, match="needs the selection of a layer before it"):
        layer.select(torch.zeros(1, 32), torch.zeros(1, 24), None, Batch([0, 1]), None, None)
    given = Selection(None)
    assert layer.select(torch.zeros(1, 32), torch.zeros(1, 24), None, Batch([0, 1]), None, given) is given


def test_the_dense_warm_up_sees_every_key():
    model, ids = random_model(SHARED, 7), random_ids(SHARED, 2, T)
    with torch.no_grad():
        dense, sparse = with_config(model, index_topk=T)(ids).logits, model(ids).logits
        model.see_all_keys = True
        assert torch.equal(model(ids).logits, sparse), "serving stays sparse"
        model.train()
        assert torch.equal(model(ids).logits, dense)
        model.see_all_keys = False
        assert torch.equal(model(ids).logits, sparse)


@pytest.mark.parametrize("dense", [True, False])
def test_the_indexers_loss_trains_indexers_alone(dense):
    model, ids = random_model(SHARED, 8).train(), random_ids(SHARED, 2, T)
    model.collect_kl, model.see_all_keys = True, dense
    out = model(ids, mtp=True)
    losses = model.indexer_kl()
    assert [len(kl) for kl in losses] == [2 * T] * 4 + [2 * (T - 1)], "the MTP layer is the last"
    assert all((kl > 0).any() and kl.isfinite().all() for kl in losses)
    torch.autograd.backward(losses, [torch.ones_like(kl) for kl in losses])
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (".indexer." in name), name
    model.zero_grad()
    out.logits.sum().backward()
    assert all(p.grad is None for name, p in model.named_parameters() if ".indexer." in name)


def test_a_shared_layer_measures_the_indexer_whose_list_it_uses():
    model, ids = random_model(SHARED, 9).train(), random_ids(SHARED, 1, T)
    model.collect_kl = True
    model(ids)
    losses = model.indexer_kl()
    assert len(losses) == 4
    indexers = {n: p for n, p in model.named_parameters() if n.endswith("indexer.wq_b.weight")}
    for layer, owner in enumerate([0, 0, 2, 2]):
        grads = torch.autograd.grad(losses[layer].sum(), list(indexers.values()), retain_graph=True, allow_unused=True)
        reached = [name.split(".")[2] for name, grad in zip(indexers, grads, strict=True) if grad is not None]
        assert reached == [str(owner)]


def test_losses_of_an_earlier_forward_are_gone():
    model, ids = random_model(SHARED, 10).train(), random_ids(SHARED, 1, T)
    model.collect_kl = True
    model(ids, mtp=True)
    assert len(model.indexer_kl()) == 5
    model(ids)
    assert len(model.indexer_kl()) == 4, "the MTP layer did not run"
    model.collect_kl = False
    model(ids)
    assert model.indexer_kl() == []
    model.eval().collect_kl = True
    with torch.no_grad():
        model(ids)
    assert model.indexer_kl() == [], "serving measures nothing"
