"""Gradients of every parameter against transformers (decoder) and plain torch (MTP layer, losses), in fp32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plain_mtp import mtp_hidden

from tiny_glm import CASES, clear_cut, hf_state_dict, random_ids, random_model, tiny_config

pytest.importorskip("transformers")


def loss_of(logits, mtp_logits, ids):
    """Next-token loss plus 0.3 of the MTP loss; logits [B, T, V], mtp_logits [B, T-1, V], ids [B, T]."""
    main = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return main + 0.3 * F.cross_entropy(mtp_logits[:, : ids.shape[1] - 2].flatten(0, 1), ids[:, 2:].flatten())


def expected_gradients(model, twin, ids):
    """The same loss through transformers and the plain MTP layer -> gradients by glmx's parameter names."""
    config, N = model.config, model.config.num_hidden_layers
    prefix = f"model.layers.{N}."
    mtp = {
        k.removeprefix(prefix): v.clone().requires_grad_("correction_bias" not in k)
        for k, v in model.state_dict().items()
        if k.startswith(prefix)
    }
    hidden = twin.model(ids).last_hidden_state
    embed = twin.model.embed_tokens.weight
    z = torch.stack([mtp_hidden(mtp, embed, config, h[:-1], row[1:]) for h, row in zip(hidden, ids, strict=True)])
    loss = loss_of(twin.lm_head(hidden), twin.lm_head(z), ids)
    loss.backward()
    theirs = {name: p.grad for name, p in twin.named_parameters()}
    gradients = {prefix + name: tensor.grad for name, tensor in mtp.items()}
    for name, _ in model.named_parameters():
        if name in gradients or ".indexer." in name:  # selecting has no gradient
            continue
        if name.endswith(".gate_up_proj.weight"):
            pair = [theirs[name.replace("gate_up_proj", part)] for part in ("gate_proj", "up_proj")]
            gradients[name] = torch.cat(pair)
        else:
            gradients[name] = theirs[name]
    return loss.detach(), gradients


@pytest.mark.parametrize("case", CASES)
def test_every_parameter(case):
    model, twin, ids = clear_cut(tiny_config(**CASES[case]), tokens=14, start=7)
    model.train()
    out = model(ids, mtp=True)
    loss = loss_of(out.logits, out.mtp_logits, ids)
    loss.backward()
    expected_loss, expected = expected_gradients(model, twin, ids)
    assert abs(loss - expected_loss) < 1e-5
    assert len(hf_state_dict(model)) > 20
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            assert parameter.grad is None and expected.get(name) is None, name
            continue
        theirs = expected[name]
        assert theirs.norm() > 0, f"{name} takes no part in the loss"
        error = (parameter.grad - theirs).norm() / theirs.norm()
        assert error < 1e-4, f"{name}: {error}"


def test_main_grad_receives_what_autograd_would():
    model = random_model(tiny_config(use_qk_norm=True, attention_bias=True), 3).train()
    batches = [random_ids(model.config, 2, 10, seed) for seed in (1, 2)]

    def run():
        for ids in batches:
            out = model(ids, mtp=True)
            loss_of(out.logits, out.mtp_logits, ids).backward()

    run()
    autograd = {name: p.grad for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = None
        parameter.main_grad = torch.zeros(parameter.shape)
    run()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None, f"{name}: autograd has a gradient too"
        error = (parameter.main_grad - autograd[name]).norm() / autograd[name].norm()
        assert error < 1e-6, f"{name}: {error}"


def test_main_grad_of_a_bf16_model_is_fp32():
    model = random_model(tiny_config(), 4, torch.bfloat16).train()
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros(parameter.shape, dtype=torch.float32)
    ids = random_ids(model.config, 2, 10)
    out = model(ids, mtp=True)
    loss_of(out.logits, out.mtp_logits, ids).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and parameter.main_grad.isfinite().all(), name
        assert parameter.main_grad.any(), name


def test_scores_for_the_aux_loss_reach_the_router():
    model = random_model(tiny_config(), 5)
    ids = random_ids(model.config, 2, 10)
    assert not model.collect_scores and model.router_stats() == []
    model(ids)
    assert model.router_stats() == [], "eval keeps no statistics"
    model.train()
    model(ids)
    assert [s.scores for s in model.router_stats()] == [None, None], "the MTP layer did not run"
    model.collect_scores = True
    model(ids, mtp=True)
    stats = model.router_stats()
    assert [len(s.topk_ids) for s in stats] == [20, 20, 18] and all(s.scores.shape[1] == 8 for s in stats)
    sum((s.scores.square().sum() for s in stats), torch.zeros(())).backward()
    for layer in (1, 2, 3):
        assert model.model.layers[layer].mlp.gate.weight.grad.norm() > 0
    with torch.no_grad():
        model(ids)
    assert len(model.router_stats()) == 2, "the MTP layer's statistics were an earlier forward's"
