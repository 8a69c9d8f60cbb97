"""rms_norm against torch: GLM-5's rows of 6144, and the 96 query heads of 128 of a GLM-4.5-Air token.

    pytest bench/ops/bench_rms_norm.py            (OMP_NUM_THREADS sets the threads)

The peers are `F.rms_norm` and the module of Hugging Face's models, whose order of roundings is ours. The backward makes
the gradients of x and of the weight. Rows of 2048 tokens exceed the caches; one token measures the call.
"""

from __future__ import annotations

import harness
import pytest
import torch
from harness import values
from torch.nn import functional as F

import glmx.ops

ROWS = {"hidden": (1, 6144), "heads": (96, 128)}
EPS = 1e-5


def by_module(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


@pytest.mark.parametrize(("phase", "T"), [("forward", 1), ("forward", 2048), ("backward", 2048)])
@pytest.mark.parametrize("rows", ROWS)
def test_rms_norm(benchmark, record_row, rows: str, phase: str, T: int) -> None:
    heads, H = ROWS[rows]
    if benchmark.disabled:
        T = min(T, 5)
    x, weight, dy = values(T * heads, H), 1 + values(H, scale=0.1), values(T * heads, H, seed=1)
    calls = {
        "glmx": lambda: glmx.ops.rms_norm(x, weight, EPS),
        "torch F.rms_norm": lambda: F.rms_norm(x, (H,), weight, EPS),
        "torch, as in transformers": lambda: by_module(x, weight),
    }
    if phase == "backward":
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        calls = {name: harness.backward(call, leaves, dy) for name, call in calls.items()}
    harness.measure(
        benchmark,
        record_row,
        f"rms_norm {phase}, {rows}, {T * heads} x {H}",
        "rms_norm",
        calls.pop("glmx"),
        calls,
        touched=(3 if phase == "backward" else 2) * x.numel() * x.element_size(),
    )
