"""moe_mlp at a decode step's sizes, against torch and against the ops that it is made of.

    pytest bench/ops/bench_moe_mlp.py            (OMP_NUM_THREADS sets the threads)

The routed experts of one layer from given router results, bf16: "air" has GLM-4.5-Air's sizes, "flash" GLM-4.7-Flash's,
both with 32 experts, so that the weights fit beside the tests. A step of T tokens reads the experts that they name,
once. Peers: the layer in `torch.nn.functional.grouped_mm` (bench/e2e/bench_moe.py, which has the wider batches and the
backward); "four ops" is glmx's expert_plan, two grouped_gemm and moe_combine, whose bits are ours.
"""

from __future__ import annotations

from types import SimpleNamespace

import harness
import pytest
import torch
from bench.e2e.bench_moe import check, grouped, routed, values

import glmx.ops

# name -> hidden, width, experts, experts per token
LAYERS = {"air": (4096, 1408, 32, 8), "flash": (2048, 1536, 32, 4), "tiny": (64, 48, 8, 2)}


@pytest.fixture(scope="module")
def layers():
    """layers(name): sizes and weights of one layer at a time."""
    made: dict[str, SimpleNamespace] = {}

    def make(name: str) -> SimpleNamespace:
        if name not in made:
            made.clear()
            H, I, E, K = LAYERS[name]
            weights = {
                "gate_up_proj": values(E, 2 * I, H, scale=H**-0.5),
                "down_proj": values(E, H, I, scale=I**-0.5),
            }
            made[name] = SimpleNamespace(ours=SimpleNamespace(**weights), H=H, I=I, E=E, K=K)
        return made[name]

    return make


def four_ops(layer: SimpleNamespace, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    plan = glmx.ops.expert_plan(ids, layer.E)
    offsets = plan.expert_offsets
    h = glmx.ops.grouped_gemm(x, layer.ours.gate_up_proj, offsets, row_token=plan.row_token, silu_mul=True)
    return glmx.ops.moe_combine(glmx.ops.grouped_gemm(h, layer.ours.down_proj, offsets), weights, plan.inverse)


@pytest.mark.parametrize(("tokens", "rounds"), [(1, 15), (4, 9), (16, 7)])
@pytest.mark.parametrize("name", ["air", "flash"])
def test_decode(benchmark, record_row, layers, name: str, tokens: int, rounds: int) -> None:
    layer = layers("tiny" if benchmark.disabled else name)
    x, weights, ids = routed(layer, tokens)

    def ours() -> torch.Tensor:
        return glmx.ops.moe_mlp(x, weights, ids, layer.ours.gate_up_proj, layer.ours.down_proj)

    peers = {
        "torch grouped_mm": lambda: grouped(layer, x, weights, ids),
        "four ops": lambda: four_ops(layer, x, weights, ids),
    }
    expected = ours()
    assert torch.equal(expected, peers["four ops"]())
    check("torch grouped_mm", expected, peers["torch grouped_mm"]())
    if benchmark.disabled:
        return
    experts = len(ids.unique())
    harness.compare(
        benchmark,
        record_row,
        f"moe_mlp {name} T={tokens} ({experts} of {layer.E} experts)",
        "moe_mlp",
        ours,
        peers,
        flop=6.0 * tokens * layer.K * layer.H * layer.I,
        touched=6.0 * experts * layer.H * layer.I,
        rounds=rounds,
    )
