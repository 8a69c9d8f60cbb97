"""The decoder against transformers 5.23.0 and the MTP layer against a plain-torch one, in fp32."""

from __future__ import annotations

import pytest
import torch
from plain_mtp import mtp_hidden

from glmx import ops
from tiny_glm import CASES, FAMILIES, clear_cut, hf_choices, hf_twin, random_ids, random_model, tiny_config

pytest.importorskip("transformers")


@pytest.fixture
def selected(monkeypatch):
    """The lists of every call of indexer_topk, in order."""
    lists, real = [], ops.indexer_topk

    def recorded(*args, **kwargs):
        lists.append(real(*args, **kwargs))
        return lists[-1]

    monkeypatch.setattr(ops, "indexer_topk", recorded)
    return lists


@pytest.mark.parametrize("start", [0, 100])
@pytest.mark.parametrize("case", CASES)
def test_logits_routes_and_keys(case, start, selected):
    model, twin, ids = clear_cut(tiny_config(**CASES[case]), tokens=17, start=start)
    model.train()
    model.collect_scores = True
    with torch.no_grad():
        ours, theirs = model(ids).logits, twin(ids).logits
    assert ours.dtype == torch.float32 and theirs.std() > 0.5
    assert (ours - theirs).abs().max() <= 1e-4
    choices = hf_choices(twin, ids)
    config = model.config
    assert len(model.router_stats()) == len(choices.routes) == config.num_hidden_layers - config.first_k_dense_replace
    for stats, theirs_TK in zip(model.router_stats(), choices.routes, strict=True):
        assert torch.equal(stats.topk_ids.long().sort(-1).values, theirs_TK.sort(-1).values)
        counts = torch.bincount(theirs_TK.flatten(), minlength=config.n_routed_experts)
        assert torch.equal(stats.expert_counts.long(), counts)

    sparse = config.model_type == "glm_moe_dsa" and config.index_topk < 17
    assert len(selected) == (sum(map(config.has_indexer, range(config.num_hidden_layers))) if sparse else 0)
    for mine_Nk, theirs_BTk in zip(selected, choices.keys if sparse else [], strict=True):
        for row, (mine, their) in enumerate(zip(mine_Nk.tolist(), theirs_BTk.flatten(0, 1).tolist(), strict=True)):
            visible = {s for s in their if s <= row % 17}  # transformers fills short rows with keys that it masks
            assert {s for s in mine if s >= 0} == visible, (row, mine, their)


@pytest.mark.parametrize("case", CASES)
def test_bf16_is_as_close_to_exact_math_as_transformers(case):
    """Mean |logit error| of ours and of transformers' bf16 model, against the same weights in fp32.

    Selections flip in bf16, so single logits say nothing: means over six models are compared.
    """
    errors = {"ours": 0.0, "theirs": 0.0}
    for seed in range(6):
        model = random_model(tiny_config(**CASES[case]), seed, torch.bfloat16)
        exact = random_model(tiny_config(**CASES[case]), seed)
        exact.load_state_dict(model.state_dict())
        twin, reference = hf_twin(model), hf_twin(exact)
        ids = random_ids(model.config, 2, 24, seed)
        with torch.no_grad():
            expected = reference(ids).logits
            errors["ours"] += float((model(ids).logits - expected).abs().mean())
            errors["theirs"] += float((twin(ids).logits.float() - expected).abs().mean())
    assert errors["theirs"] > 0 and errors["ours"] <= 1.5 * errors["theirs"], errors


@pytest.mark.parametrize("case", ["plain", "groups", *FAMILIES])
def test_greedy_ids(case):
    model, twin, ids = clear_cut(tiny_config(**CASES[case]), tokens=5, start=3, rows=1)
    theirs = twin.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)[0, 5:].tolist()
    state, ours, new = model.new_state(1, 64), [], ids
    with torch.no_grad():
        for _ in range(24):
            ours.append(int(model(new, state=state, logits_to_keep=1).logits[0, 0].argmax()))
            new = torch.tensor([ours[-1:]])
    assert ours == theirs


@pytest.mark.parametrize("case", CASES)
def test_mtp_logits(case):
    config = tiny_config(**CASES[case])
    model, twin, ids = clear_cut(config, tokens=13, start=0)
    prefix = f"model.layers.{config.num_hidden_layers}."
    weights = {k.removeprefix(prefix): v for k, v in model.state_dict().items() if k.startswith(prefix)}
    with torch.no_grad():
        hidden = twin.model(ids).last_hidden_state
        ours = model(ids, mtp=True).mtp_logits
        for b in range(len(ids)):
            z = mtp_hidden(weights, twin.model.embed_tokens.weight, config, hidden[b, :-1], ids[b, 1:])
            assert (ours[b, :-1] - twin.lm_head(z)).abs().max() <= 1e-4
    assert not ours[:, -1].any()


def test_a_second_mtp_step_recycles_the_normed_hidden():
    config = tiny_config(use_qk_norm=True)
    model = random_model(config, 5)
    ids, T = random_ids(config, 1, 12)[0], 10
    prefix = f"model.layers.{config.num_hidden_layers}."
    weights = {k.removeprefix(prefix): v for k, v in model.state_dict().items() if k.startswith(prefix)}
    from glmx.models.batch import Batch

    positions, batch = torch.arange(T), Batch.from_lengths([T])
    with torch.no_grad():
        hidden = model.forward_tokens(ids[:T], positions, batch)
        z1 = model.mtp_hidden(hidden, ids[1 : T + 1], positions, batch)
        z2 = model.mtp_hidden(z1, ids[2 : T + 2], positions + 1, batch)
        embed = model.model.embed_tokens.weight
        expected = mtp_hidden(weights, embed, config, hidden, ids[1 : T + 1])
        expected = mtp_hidden(weights, embed, config, expected, ids[2 : T + 2])
    assert (z2 - expected).abs().max() <= 1e-4
