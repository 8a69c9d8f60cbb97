"""Training indexers: their loss, what it must not touch, the dense warm-up, resuming across its end."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glmx import ops
from glmx.data.packing import PackedRows
from glmx.data.shards import TokenShards
from glmx.errors import ConfigError
from glmx.models.batch import Batch
from glmx.train import checkpoint, loop
from glmx.train.balance import ExpertLoads
from glmx.train.config import make_config
from glmx.train.loop import pretrain
from glmx.train.loss import Denominators, Losses, forward_backward
from glmx.train.optim import AdamW, part_of
from glmx.train.run import build_model

SEQ = 24


@pytest.fixture
def model(dsa_dir):
    model = build_model(dsa_dir, torch.float32, seed=1)
    with torch.no_grad():  # at the init range of 0.02 a tiny model attends to everything alike
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(8.0)
    model.collect_kl = True
    return model.train()


def batches_of(data_dir, micro_rows):
    shards = TokenShards.open(data_dir, "train")
    return PackedRows(shards, seq_len=SEQ, batch_rows=4, micro_rows=micro_rows, seed=5).next_step()


def gradients(model, micro_batches, kl_weight):
    optim = AdamW(model.named_parameters(), beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)
    counts, losses = Denominators.of(micro_batches, SEQ), Losses()
    for micro in micro_batches:
        forward_backward(
            model, micro, counts, seq_len=SEQ, mtp_weight=0.3, aux_weight=0.0, kl_weight=kl_weight, losses=losses,
            loads=ExpertLoads(),
        )  # fmt: skip
        optim.fold_grads()
    return losses, {name: p.main_grad.clone() for name, p in model.named_parameters()}


def records(out):
    log = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("time_s", "tokens_per_s")} for r in log]


def tensors(out):
    path = checkpoint.latest(Path(out))
    return {**load_file(path / "model.safetensors"), **load_file(path / "trainer" / "state.safetensors")}


@pytest.mark.parametrize("dense", [True, False])
def test_the_loss_is_the_mean_over_tokens_and_its_gradient_is_autograds(model, data_dir, dense):
    """The MTP layer's mean is over the tokens whose next one is known; layers are summed for the gradient."""
    (micro,) = batches_of(data_dir, micro_rows=4)
    model.see_all_keys = dense
    batch = Batch(micro.cu_seqlens)
    hidden = model.forward_tokens(micro.ids, micro.positions, batch)
    model.mtp_hidden(hidden, micro.next_ids[0], micro.positions, batch)
    first, shared, mtp = model.indexer_kl()
    known = micro.targets >= 0
    assert 0 < known.sum() < known.numel()
    means = [first.mean(), shared.mean(), mtp[known].mean()]
    assert min(means) > 1e-3
    (0.7 * sum(means)).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if part_of(name) == "indexer"}
    assert len(expected) == 2 * 5
    model.zero_grad()

    losses, found = gradients(model, [micro], 0.7)
    assert losses.indexer_kl == pytest.approx(sum(m.item() for m in means) / 3, rel=1e-5)
    for name, grad in expected.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)

    parts, split = gradients(model, batches_of(data_dir, micro_rows=1), 0.7)
    assert parts.indexer_kl == pytest.approx(losses.indexer_kl, rel=1e-6)
    for name, grad in expected.items():
        torch.testing.assert_close(split[name], grad, rtol=1e-4, atol=1e-6)


def test_the_rest_of_the_model_does_not_feel_it_while_attention_is_sparse(model, data_dir):
    micro_batches = batches_of(data_dir, micro_rows=2)
    _, without = gradients(model, micro_batches, 0.0)
    _, with_it = gradients(model, micro_batches, 50.0)
    for name in without:
        if part_of(name) == "model":
            assert torch.equal(without[name], with_it[name]), name
        else:
            assert not without[name].any() and with_it[name].any(), name


def test_whole_runs_differ_in_the_indexers_alone_while_attention_is_dense(dsa_raw):
    """Clipping included: a weight of 500 makes the indexers' gradient the larger one by far."""
    dsa_raw["indexer"]["dense_tokens"] = 10**6
    saved, logs = {}, {}
    for weight in (0.0, 1.0, 500.0):
        run = {**dsa_raw, "out": f"{dsa_raw['out']}-{weight}", "indexer": {**dsa_raw["indexer"], "weight": weight}}
        pretrain(make_config(run), quiet=True)
        saved[weight], logs[weight] = tensors(run["out"]), records(run["out"])
    for weight in (1.0, 500.0):
        for name, tensor in saved[0.0].items():
            assert torch.equal(tensor, saved[weight][name]) == (part_of(name) == "model"), name
    trained = [k for k in saved[1.0] if part_of(k) == "indexer"]
    assert any(not torch.equal(saved[1.0][k], saved[500.0][k]) for k in trained)
    for record, other in zip(logs[0.0], logs[1.0], strict=True):
        kl = other.get("indexer_kl")
        assert kl is None or kl > 0
        # Held-out records are of sparse attention, as a server computes it: the indexers show there.
        same = {k: v for k, v in record.items() if k not in ("indexer_kl", "heldout_loss")}
        assert same == {k: other[k] for k in same} and record.get("indexer_kl") is None


def test_attention_is_dense_until_dense_tokens_and_resuming_across_the_switch_gives_the_same_bits(dsa_raw, monkeypatch):
    """`sparse_mla` runs from the fourth step on. The run is cut before, at and after the switch."""
    calls, real = [], ops.sparse_mla
    monkeypatch.setattr(ops, "sparse_mla", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    dsa_raw["data"]["heldout"], per_step = "", []
    whole = {**dsa_raw, "out": dsa_raw["out"] + "-whole"}
    pretrain(make_config(whole), quiet=True, on_record=lambda _: per_step.append(len(calls)))
    assert per_step == [0, 0, 0, 6, 12, 18]  # three layers, two micro-batches
    for stop in (2, 3, 4, 6):
        cut_after(dsa_raw, stop)
    assert records(dsa_raw["out"]) == records(whole["out"])
    found, expected = tensors(dsa_raw["out"]), tensors(whole["out"])
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


def cut_after(raw, step):
    """Trains on until `step`, where the run is asked to stop."""

    def stop(record):
        if record["step"] == step:
            request[0].reason = "cut"

    request, enter = [], loop.StopRequest.__enter__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.StopRequest, "__enter__", lambda self: request.append(self) or enter(self))
        assert pretrain(make_config(raw), quiet=True, on_record=stop).step == step


def test_indexers_alone(dsa_raw, tmp_path):
    """GLM-5's warm-up from a dense model: nothing else moves, balance biases included, and the divergence falls."""
    dsa_raw["data"]["heldout"] = ""
    dense = {**dsa_raw, "indexer": {"weight": 0.0, "dense_tokens": 10**6}}
    start = pretrain(make_config(dense), quiet=True)
    before = load_file(start.checkpoint / "model.safetensors")
    warm_up = {
        **dsa_raw,
        "model": str(start.checkpoint),
        "out": str(tmp_path / "warm-up"),
        "indexer": {"only": True, "dense_tokens": 10**6},
        "train": {**dsa_raw["train"], "steps": 60},
    }
    result = pretrain(make_config(warm_up), quiet=True)
    after = load_file(result.checkpoint / "model.safetensors")
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (part_of(name) == "model"), name
    log = records(warm_up["out"])
    assert log[-1]["indexer_kl"] < 0.8 * log[0]["indexer_kl"] and log[0]["grad_norm"] > 0
    assert set(tensors(warm_up["out"])) - set(before) == {
        f"{kind}.{name}"
        for kind in ("master", "exp_avg", "exp_avg_sq")
        for name in before
        if part_of(name) == "indexer"
    } | {"rng.torch"}


def test_keys_of_the_section_are_refused_for_a_model_without_indexers(raw, dsa_raw):
    for key, value in {"weight": 1.0, "dense_tokens": 0, "only": False}.items():
        with pytest.raises(ConfigError, match=rf"indexer\.{key} is {value}, but the glm4_moe of .* has no indexers"):
            pretrain(make_config({**raw, "indexer": {key: value}}))
    assert not Path(raw["out"]).exists()
    for section, words in (
        ({"weight": -1.0}, "indexer.weight is -1.0: expected float >= 0.0"),
        ({"weight": "much"}, "indexer.weight is 'much': expected float, got str"),
        ({"dense_tokens": 1.5}, "indexer.dense_tokens is 1.5: expected int"),
        ({"wieght": 1.0}, "unknown key 'indexer.wieght': did you mean 'indexer.weight'"),
        ({"only": True, "weight": 0.0}, "indexer.only is True and indexer.weight is 0.0: nothing"),
    ):
        with pytest.raises(ConfigError) as error:
            make_config({**dsa_raw, "indexer": section})
        assert words in str(error.value)
    with pytest.raises(ConfigError, match=r"indexer\.dense_tokens is 96, but .* was made with None"):
        pretrain(make_config({**dsa_raw, "indexer": {}, "train": {**dsa_raw["train"], "minutes": 1e-6}}), quiet=True)
        pretrain(make_config({**dsa_raw, "indexer": {"dense_tokens": 96}}))
