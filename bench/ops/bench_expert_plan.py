"""expert_plan against torch: the (token, expert) pairs of GLM-4.5-Air (128 experts) and GLM-5 (256), 8 for each token.

    pytest bench/ops/bench_expert_plan.py            (OMP_NUM_THREADS sets the threads)

The peer is a stable argsort, `bincount` and a scatter. Pairs of 2048 tokens lie in the caches; 131,072 tokens are a
batch of training whose lists do not fit the inner ones.
"""

from __future__ import annotations

import harness
import pytest
import torch

import glmx.ops

EXPERTS = {"air": 128, "glm5": 256}
TOP_K = 8


def by_argsort(ids: torch.Tensor, E: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    offsets = torch.zeros(E + 1, dtype=torch.int32)
    torch.cumsum(torch.bincount(flat, minlength=E), 0, dtype=torch.int32, out=offsets[1:])
    inverse = torch.empty_like(flat)
    inverse[order] = torch.arange(len(flat), dtype=torch.int32)
    return offsets, order // ids.shape[1], inverse.view_as(ids)


@pytest.mark.parametrize("T", [1, 16, 2048, 131072])
@pytest.mark.parametrize("layer", EXPERTS)
def test_expert_plan(benchmark, record_row, layer: str, T: int) -> None:
    E = EXPERTS[layer]
    if benchmark.disabled:
        T = min(T, 5)
    ids = torch.rand(T, E, generator=torch.Generator().manual_seed(T)).topk(TOP_K).indices.int()
    harness.measure(
        benchmark,
        record_row,
        f"expert_plan {layer}, {T} x {TOP_K} of {E}",
        "expert_plan",
        lambda: glmx.ops.expert_plan(ids, E),
        {"torch": lambda: by_argsort(ids, E)},
        touched=4 * (3 * T * TOP_K + E + 1),
    )
