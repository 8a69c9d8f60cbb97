"""silu_mul against torch: the dense layers of GLM-5, gate and up of 12,288 each.

    pytest bench/ops/bench_silu_mul.py            (OMP_NUM_THREADS sets the threads)

The peer is `F.silu(gate) * up` and its gradient by autograd. Rows of 2048 tokens exceed the caches.
"""

from __future__ import annotations

import harness
import pytest
import torch
from harness import values
from torch.nn import functional as F

import glmx.ops

WIDTH = 12288


@pytest.mark.parametrize(("phase", "T"), [("forward", 1), ("forward", 16), ("forward", 2048), ("backward", 2048)])
def test_silu_mul(benchmark, record_row, phase: str, T: int) -> None:
    if benchmark.disabled:
        T = min(T, 5)
    x, dy = values(T, 2 * WIDTH), values(T, WIDTH)

    def by_halves() -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    calls = {"glmx": lambda: glmx.ops.silu_mul(x), "torch": by_halves}
    if phase == "backward":
        x.requires_grad_()
        calls = {name: harness.backward(call, [x], dy) for name, call in calls.items()}
    harness.measure(
        benchmark,
        record_row,
        f"silu_mul {phase}, {T} x {WIDTH}",
        "silu_mul",
        calls.pop("glmx"),
        calls,
        touched=(5 if phase == "backward" else 3) * T * WIDTH * x.element_size(),
    )
