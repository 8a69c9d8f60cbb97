"""moe_mlp at a decode step's sizes, against torch and against the ops that it is made of.

    pytest bench/ops/bench_moe_mlp.py            (OMP_NUM_THREADS sets the threads)

The routed experts of one layer from given router results, bf16 (bench/moe_layers.py has the sizes). A step of T tokens
reads the experts that they name, once. Peers: the layer in `torch.nn.functional.grouped_mm` (bench/e2e/bench_moe.py
has more peers, the wider batches and the backward); "four ops" is glmx's expert_plan, two grouped_gemm and moe_combine,
whose bits are ours.
"""

from __future__ import annotations

import harness
import moe_layers
import pytest
import torch

import glmx.ops


@pytest.fixture(scope="module")
def layers() -> harness.OneAtATime:
    """layers(name)"""
    return harness.OneAtATime(moe_layers.make)


@torch.no_grad()
@pytest.mark.parametrize(("tokens", "rounds"), [(1, 15), (4, 9), (16, 7)])
@pytest.mark.parametrize("name", ["GLM-4.5-Air", "GLM-4.7-Flash"])
def test_decode(benchmark, record_row, layers, name: str, tokens: int, rounds: int) -> None:
    layer = layers("tiny" if benchmark.disabled else name)
    gate_up, down = moe_layers.stacks(layer)
    x, weights, ids = moe_layers.routed(layer, tokens)
    peer = moe_layers.grouped(gate_up, down)

    def ours() -> torch.Tensor:
        return glmx.ops.moe_mlp(x, weights, ids, gate_up, down)

    def four_ops() -> torch.Tensor:
        plan = glmx.ops.expert_plan(ids, layer.E)
        h = glmx.ops.grouped_gemm(x, gate_up, plan.expert_offsets, row_token=plan.row_token, silu_mul=True)
        rows = glmx.ops.grouped_gemm(h, down, plan.expert_offsets)
        return glmx.ops.moe_combine(rows, weights, plan.inverse)

    peers = {"torch grouped_mm": lambda: peer(x, weights, ids), "four ops": four_ops}
    assert torch.equal(ours(), four_ops())
    moe_layers.check("torch grouped_mm", ours(), peers["torch grouped_mm"]())
    if benchmark.disabled:
        return
    flop, touched = moe_layers.work(layer, ids)
    row = f"moe_mlp {name} T={tokens} ({len(ids.unique())} of {layer.E} experts)"
    harness.compare(benchmark, record_row, row, "moe_mlp", ours, peers, flop=flop, touched=touched, rounds=rounds)
