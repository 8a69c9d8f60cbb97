"""add_rms_norm against torch: GLM-5's residual rows of 6144.

    pytest bench/ops/bench_add_rms_norm.py            (OMP_NUM_THREADS sets the threads)

The peer is an add, then `F.rms_norm`. The backward gets the gradients of both results and makes those of x, the
residual (which are one) and the weight. Rows of 2048 tokens exceed the caches; one token measures the call.
"""

from __future__ import annotations

import harness
import pytest
import torch
from harness import values
from torch.nn import functional as F

import glmx.ops

H, EPS = 6144, 1e-5


@pytest.mark.parametrize(("phase", "T"), [("forward", 1), ("forward", 2048), ("backward", 2048)])
def test_add_rms_norm(benchmark, record_row, phase: str, T: int) -> None:
    if benchmark.disabled:
        T = min(T, 5)
    x, residual, dy, d_total = (values(T, H, seed=seed) for seed in range(4))
    weight = 1 + values(H, scale=0.1)

    def by_steps() -> tuple[torch.Tensor, torch.Tensor]:
        total = residual + x
        return F.rms_norm(total, (H,), weight, EPS), total

    calls = {"glmx": lambda: glmx.ops.add_rms_norm(x, residual, weight, EPS), "torch": by_steps}
    if phase == "backward":
        leaves = [x.requires_grad_(), residual.requires_grad_(), weight.requires_grad_()]
        calls = {name: harness.backward(call, leaves, dy, d_total) for name, call in calls.items()}
    harness.measure(
        benchmark,
        record_row,
        f"add_rms_norm {phase}, {T} x {H}",
        "add_rms_norm",
        calls.pop("glmx"),
        calls,
        touched=4 * x.numel() * x.element_size(),
    )
