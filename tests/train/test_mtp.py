"""Several steps of the MTP layer: against plain torch in fp64, at borders, the lists they share, whole runs."""

import json

import pytest
import torch
import torch.nn.functional as F
from plain_mtp import mtp_chain

from glmx import ops
from glmx.data.packing import PackedBatch, _batch
from glmx.errors import ConfigError
from glmx.models.batch import Batch
from glmx.train.balance import ExpertLoads
from glmx.train.config import make_config
from glmx.train.loop import pretrain
from glmx.train.loss import Denominators, Losses, forward_backward, mtp_passes, target_logprobs
from glmx.train.optim import AdamW, part_of
from tiny_glm import CASES, FAMILIES, hf_twin, random_ids, random_model, tiny_config

S = 3
# (tokens of the document from a row's first on, of which the row holds so many): one is cut, one is shorter than S.
PIECES = [(11, 11), (2, 2), (12, 9), (5, 5), (1, 1)]


def packed(config, mtp_steps=S) -> tuple[list[torch.Tensor], PackedBatch]:
    """The pieces' tokens, with up to mtp_steps + 1 behind the row's, and the micro-batch of them."""
    documents = random_ids(config, 1, sum(tokens for tokens, _ in PIECES), 2)[0].split([n for n, _ in PIECES])
    segments = [(d.numpy(), length, 0) for d, (_, length) in zip(documents, PIECES, strict=True)]
    return list(documents), _batch(segments, mtp_steps)


def gradients(model, micro, kl_weight=0.0):
    optim = AdamW(model.named_parameters(), beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)
    losses, counts = Losses(), Denominators.of([micro], micro.num_tokens)
    forward_backward(
        model, micro, counts, seq_len=micro.num_tokens, mtp_weight=0.3, aux_weight=0.0, kl_weight=kl_weight,
        losses=losses, loads=ExpertLoads(),
    )  # fmt: skip
    optim.fold_grads()
    return losses, {name: p.main_grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("case", [*FAMILIES, "dsa"])
def test_losses_and_gradients_against_plain_torch_in_fp64(case):
    """Each document alone, by transformers and the plain MTP layer; rows that would need a token behind the document's
    last do not exist there. `dsa_shared` attends to the first step's keys, `dsa` selects in every step."""
    pytest.importorskip("transformers")
    model = random_model(tiny_config(**CASES[case]), 11)
    config, prefix = model.config, f"model.layers.{model.config.num_hidden_layers}."
    twin = hf_twin(model).double()
    twin.config._experts_implementation = "eager"  # the default one has no fp64
    documents, micro = packed(config)
    mtp = {
        k.removeprefix(prefix): v.double().requires_grad_("correction_bias" not in k)
        for k, v in model.state_dict().items()
        if k.startswith(prefix)
    }
    logprobs: list[list[torch.Tensor]] = [[] for _ in range(S + 1)]
    embed, head = twin.model.embed_tokens.weight, twin.lm_head.weight
    for ids, (_, length) in zip(documents, PIECES, strict=True):
        hidden = twin.model(ids[None, :length]).last_hidden_state[0]
        for s, z in enumerate([hidden, *mtp_chain(mtp, embed, config, hidden, ids, S)]):
            targets = ids[s + 1 : s + 1 + len(z)]
            logprobs[s].append(-F.cross_entropy(z[: len(targets)] @ head.T, targets, reduction="none"))
    main, *later = (-torch.cat(each).mean() for each in logprobs)
    (main + 0.3 * sum(later) / S).backward()
    theirs = {name: p.grad for name, p in twin.named_parameters()} | {prefix + k: v.grad for k, v in mtp.items()}

    losses, ours = gradients(model.train(), micro)
    assert losses.main == pytest.approx(main.item(), abs=1e-5)
    assert losses.mtp == pytest.approx([loss.item() for loss in later], abs=1e-5)
    for name, grad in ours.items():
        if part_of(name) == "indexer":
            assert not grad.any()
            continue
        expected = theirs.get(name)
        if expected is None:
            pair = [theirs[name.replace("gate_up_proj", part)] for part in ("gate_proj", "up_proj")]
            expected = torch.cat(pair)
        assert expected.norm() > 0, f"{name} takes no part in the loss"
        error = (grad - expected).norm() / expected.norm()
        assert error < 1e-5, f"{name}: {error}"  # found: 1e-6; sums of some hundred terms in fp32


def test_the_next_document_does_not_show():
    """Bit for bit: what a row makes of its document is the same whatever stands behind it."""
    for case in FAMILIES:
        model, found = random_model(tiny_config(**CASES[case]), 3), []
        for seed in (1, 2):
            first, second = random_ids(model.config, 1, 8)[0], random_ids(model.config, 1, 9, seed)[0]
            micro, batch = _batch([(first.numpy(), 8, 0), (second.numpy(), 9, 0)], S), Batch([0, 8, 17])
            with torch.no_grad():
                hidden = model.forward_tokens(micro.ids, micro.positions, batch)
                steps = zip(mtp_passes(model, hidden, micro, batch), micro.mtp_targets, strict=True)
                found.append([target_logprobs(model, step.hidden_TH, targets) for step, targets in steps])
        for s, (one, other) in enumerate(zip(*found, strict=True), 1):
            assert torch.equal(one[:8], other[:8]) and not torch.equal(one[8:], other[8:])
            assert one[: 7 - s].all() and not one[7 - s : 8].any(), "the last rows have no target"


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_the_kl_of_the_mtp_layer_is_the_mean_of_its_steps(shared, dense, monkeypatch):
    """Rows whose token s ahead is behind the document's end are left out. With index_share_for_mtp_iteration the keys
    are selected once, and the list's scores answer for the attention of every step."""
    config = tiny_config(**CASES["dsa_shared"] | {"index_share_for_mtp_iteration": shared})
    model = random_model(config, 6).train()
    model.collect_kl, model.see_all_keys = True, dense
    _, micro = packed(config)
    batch, selection, steps = Batch(micro.cu_seqlens), None, []
    z = model.forward_tokens(micro.ids, micro.positions, batch)
    trunk = [kl.mean() for kl in model.indexer_kl()]
    assert len(trunk) == config.num_hidden_layers
    for s in range(1, S + 1):
        step = model.mtp_step(z, micro.next_ids[s - 1], micro.positions + s - 1, batch, selection=selection)
        z, selection = step.hidden, step.selection if shared else None
        known = torch.tensor([row + s < tokens for tokens, length in PIECES for row in range(length)])
        assert known.any() and not known.all()
        steps.append(model.indexer_kl()[-1][known].mean())
    assert len({round(kl.item(), 6) for kl in steps}) == S and min(steps) > 1e-3
    mean = sum(steps) / S
    (0.7 * (sum(trunk) + mean)).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if part_of(name) == "indexer"}
    model.zero_grad()

    made, select = [], ops.indexer_topk
    monkeypatch.setattr(ops, "indexer_topk", lambda *args, **kwargs: made.append(1) or select(*args, **kwargs))
    losses, found = gradients(model, micro, kl_weight=0.7)
    assert len(made) == (0 if dense else 2 + (1 if shared else S))
    assert losses.indexer_kl == pytest.approx((sum(trunk) + mean).item() / (len(trunk) + 1), rel=1e-5)
    for name, grad in expected.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)


def test_the_log_has_a_loss_for_each_step(raw, capsys):
    one, three = [], []
    pretrain(make_config({**raw, "out": raw["out"] + "-one"}), quiet=True, on_record=one.append)
    pretrain(make_config({**raw, "mtp_steps": 3}), on_record=three.append)
    words = "mtp " + " ".join(f"{loss:.3f}" for loss in three[0]["mtp_step_losses"])
    assert words in capsys.readouterr().err
    for record in (r for r in three if "loss" in r):
        losses = record["mtp_step_losses"]
        assert len(set(losses)) == 3 and record["mtp_loss"] == pytest.approx(sum(losses) / 3, rel=1e-12)
        # 96 tokens take 2 of 8 experts in the MoE layer, and in each of the MTP layer's three steps.
        assert [sum(load) for load in record["expert_load"]] == [192, 3 * 192]
    # Before the first update the model is the same, and so is the first of the steps.
    assert three[0]["loss"] == one[0]["loss"] and three[0]["mtp_step_losses"][0] == one[0]["mtp_loss"]
    assert all(three[-2]["mtp_step_losses"][s] < three[0]["mtp_step_losses"][s] for s in range(3))


def test_steps_that_cannot_be_trained_are_refused(raw, model_dir, tmp_path):
    for changes, words in (
        ({"mtp_steps": 0}, "mtp_steps is 0: expected int >= 1"),
        ({"mtp_steps": 25}, "mtp_steps is 25: it must not exceed data.seq_len, which is 24"),
        ({"mtp_steps": 2, "mtp_loss_weight": 0.0}, "mtp_steps is 2 and mtp_loss_weight is 0.0: no step would"),
        ({"mtp_step": 2}, "unknown key 'mtp_step': did you mean 'mtp_steps'"),
    ):
        with pytest.raises(ConfigError) as error:
            make_config({**raw, **changes})
        assert words in str(error.value)
    config = json.loads((model_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    with pytest.raises(ConfigError, match="mtp_steps is 2, but the model of .* has no MTP layer: leave it out"):
        pretrain(make_config({**raw, "model": str(tmp_path), "mtp_steps": 2}))


def test_a_checkpoint_from_before_there_were_steps_has_one(raw):
    result = pretrain(make_config({**raw, "train": {**raw["train"], "minutes": 1e-6}}), quiet=True)
    state = result.checkpoint / "trainer" / "state.json"
    saved = json.loads(state.read_text())
    assert saved["config"].pop("mtp_steps") == 1
    state.write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match="mtp_steps is 2, but the checkpoint in .* was made with 1"):
        pretrain(make_config({**raw, "mtp_steps": 2}), quiet=True)
    assert pretrain(make_config(raw), quiet=True).step == 6
