"""MoE against a loop over tokens in fp64, from balanced routing to all tokens at one expert."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tiny_glm import random_model, tiny_config


def plain(moe, x_TH, config):
    logits = x_TH.double() @ moe.gate.weight.double().T
    scores = logits.sigmoid()
    out = []
    for t, x in enumerate(x_TH.double()):
        biased = scores[t] + moe.gate.e_score_correction_bias.double()
        chosen = biased.sort(descending=True, stable=True).indices[: config.num_experts_per_tok]
        weights = scores[t, chosen] / scores[t, chosen].sum() * config.routed_scaling_factor
        y = torch.zeros_like(x)
        for e, weight in zip(chosen.tolist(), weights, strict=True):
            gate, up = (moe.experts.gate_up_proj[e].double() @ x).chunk(2)
            y += weight * (moe.experts.down_proj[e].double() @ (F.silu(gate) * up))
        gate, up = (moe.shared_experts.gate_up_proj.weight.double() @ x).chunk(2)
        out.append(y + moe.shared_experts.down_proj.weight.double() @ (F.silu(gate) * up))
    return torch.stack(out)


@pytest.mark.parametrize("skew", [0.0, 0.3, 10.0])
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_moe(tokens, skew):
    config = tiny_config(n_routed_experts=7, num_experts_per_tok=3, routed_scaling_factor=1.5)
    moe = random_model(config, 1).model.layers[1].mlp.train()
    with torch.no_grad():
        moe.gate.e_score_correction_bias += skew * torch.arange(7)
        x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(tokens))
        y = moe(x)
        assert torch.allclose(y.double(), plain(moe, x, config), rtol=1e-5, atol=1e-5)
    counts = moe.gate.stats.expert_counts
    assert int(counts.sum()) == 3 * tokens
    if skew == 10.0:
        assert counts.tolist() == [0, 0, 0, 0, tokens, tokens, tokens]


def test_the_bias_selects_and_does_not_weigh():
    """Raising every bias by the same amount changes nothing."""
    config = tiny_config()
    moe = random_model(config, 2).model.layers[1].mlp
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = moe(x)
        moe.gate.e_score_correction_bias += 4.0
        assert torch.equal(moe(x), before)


def test_a_router_in_fp32_reads_the_bf16_hidden_upcast():
    config = tiny_config()
    moe = random_model(config, 3, torch.bfloat16).model.layers[1].mlp
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        rounded = moe.gate(x)
        moe.gate.weight.data = moe.gate.weight.data.float()
        # The same values in fp32: the products are exact either way, and so are the results.
        for a, b in zip(moe.gate(x), rounded, strict=True):
            assert torch.equal(a, b)
