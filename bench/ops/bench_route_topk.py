"""route_topk against torch: the routers of GLM-4.5-Air (128 experts) and GLM-5 (256), 8 experts for each token.

    pytest bench/ops/bench_route_topk.py            (OMP_NUM_THREADS sets the threads)

The peer is sigmoid, `topk` of the biased scores, gather, the weights' normalisation and `bincount`. The backward makes
the gradient of the logits from that of the weights. Logits of 2048 tokens are 2 MB: the products before left them in
the caches, and so does the benchmark.
"""

from __future__ import annotations

import harness
import pytest
import torch
from harness import values

import glmx.ops

EXPERTS = {"air": 128, "glm5": 256}
TOP_K, SCALE = 8, 2.5


def by_topk(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scores = logits.sigmoid()
    ids = (scores.detach() + bias).topk(TOP_K).indices
    weights = scores.gather(1, ids)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * SCALE
    return weights, ids, torch.bincount(ids.flatten(), minlength=len(bias))


@pytest.mark.parametrize(("phase", "T"), [("forward", 1), ("forward", 16), ("forward", 2048), ("backward", 2048)])
@pytest.mark.parametrize("layer", EXPERTS)
def test_route_topk(benchmark, record_row, layer: str, phase: str, T: int) -> None:
    E = EXPERTS[layer]
    if benchmark.disabled:
        T = min(T, 5)
    logits, bias = values(T, E, dtype=torch.float32), values(E, scale=0.1, dtype=torch.float32)
    d_weights = values(T, TOP_K, dtype=torch.float32)
    calls = {
        "glmx": lambda: glmx.ops.route_topk(logits, bias, TOP_K, routed_scaling_factor=SCALE),
        "torch": lambda: by_topk(logits, bias),
    }
    if phase == "backward":
        logits.requires_grad_()
        calls = {name: harness.backward(call, [logits], d_weights) for name, call in calls.items()}
    harness.measure(
        benchmark,
        record_row,
        f"route_topk {phase}, {layer}, {T} x {E}, top-{TOP_K}",
        "route_topk",
        calls.pop("glmx"),
        calls,
        touched=4 * T * (2 * E + 2 * TOP_K if phase == "backward" else E + 2 * TOP_K),
    )
