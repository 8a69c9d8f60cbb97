"""Routing and permutation in a MoE layer: what route_topk, expert_plan and moe_combine take of the whole layer's time.

    pytest bench/e2e/bench_moe_routing.py            (OMP_NUM_THREADS sets the threads)

"small" of bench/moe_layers.py with its router's product and a shared expert; the gather is part of grouped_gemm. A row
times the three ops, with the weighted sum over given rows of the experts, in turns with the whole layer, and says their
share; 5 % at most is the aim. The peers are the same in torch's ops: sigmoid, topk, argsort, bincount, then index_add
in fp32, or a gather by token and a product of its rows with the weights.
"""

from __future__ import annotations

import harness
import moe_layers
import pytest
import torch

import glmx.ops


@torch.no_grad()
@pytest.mark.parametrize(("tokens", "rounds"), [(1, 25), (16, 15), (256, 7), (2048, 3)])
def test_share(benchmark, record_row, tokens: int, rounds: int) -> None:
    shape, tokens = ("tiny", min(tokens, 32)) if benchmark.disabled else ("small", tokens)
    layer = moe_layers.make(shape)
    E, K, H, gate = layer.E, layer.K, layer.H, layer.moe.gate
    bias = torch.randn(E, generator=torch.Generator().manual_seed(E)) * 2**-6
    gate.e_score_correction_bias.copy_(bias)
    x, rows = harness.values(tokens, H), harness.values(tokens * K, H)
    logits = glmx.ops.linear(x, gate.weight, out_dtype=torch.float32)

    def ours() -> torch.Tensor:
        weights, ids, _ = glmx.ops.route_topk(logits, bias, K)
        return glmx.ops.moe_combine(rows, weights, glmx.ops.expert_plan(ids, E).inverse)

    def routed() -> tuple[torch.Tensor, torch.Tensor]:
        scores = logits.sigmoid()
        ids = (scores + bias).topk(K).indices
        weights = scores.gather(1, ids)
        flat = ids.flatten()
        torch.bincount(flat, minlength=E).cumsum(0)  # the products' offsets
        return weights / weights.sum(-1, keepdim=True), flat.argsort(stable=True)

    def index_add() -> torch.Tensor:
        weights, order = routed()
        out = torch.zeros(tokens, H)
        return out.index_add_(0, order // K, rows.float() * weights.flatten()[order, None]).to(rows.dtype)

    def gather() -> torch.Tensor:
        weights, order = routed()
        inverse = torch.empty_like(order).index_copy_(0, order, torch.arange(tokens * K))
        return (weights.to(rows.dtype)[:, None] @ rows[inverse].view(tokens, K, H))[:, 0]

    peers = {"torch index_add": index_add, "torch gather": gather}
    for name, peer in peers.items():
        moe_layers.check(name, ours(), peer())
    if benchmark.disabled:
        return

    def record(row: harness.Row) -> None:
        row.note = f"{100 / row.ratio.pop('the layer'):.1f} % of the layer"
        record_row(row)

    harness.compare(
        benchmark,
        record,
        f"MoE routing and combine, {shape}, T={tokens}",
        "moe_combine",
        ours,
        {**peers, "the layer": lambda: layer.moe(x)},
        flop=2.0 * tokens * K * H,
        touched=2.0 * tokens * (K + 1) * H,
        rounds=rounds,
    )
