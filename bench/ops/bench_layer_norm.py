"""layer_norm against `F.layer_norm`: the indexer's keys of GLM-5, 128 wide, and rows as wide as its hidden states.

    pytest bench/ops/bench_layer_norm.py            (OMP_NUM_THREADS sets the threads)

The keys of 2048 tokens lie in the caches, those of a prompt of 131,072 do not, and neither do 2048 wide rows. The
backward makes the gradients of x, weight and bias. Its peer is `F.layer_norm` in fp32: in bf16 torch adds up the
gradients of weight and bias in bf16, 2 to 6 % away from the exact ones.
"""

from __future__ import annotations

import harness
import pytest
import torch
from harness import values
from torch.nn import functional as F

import glmx.ops

KEY, HIDDEN, EPS = 128, 6144, 1e-6


def in_fp32(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), EPS).to(x.dtype)


@pytest.mark.parametrize(
    ("phase", "T", "H"),
    [
        ("forward", 1, KEY),
        ("forward", 2048, KEY),
        ("forward", 131072, KEY),
        ("forward", 2048, HIDDEN),
        ("backward", 2048, KEY),
        ("backward", 2048, HIDDEN),
    ],
)
def test_layer_norm(benchmark, record_row, phase: str, T: int, H: int) -> None:
    if benchmark.disabled:
        T = min(T, 5)
    x, weight, bias, dy = values(T, H), 1 + values(H, scale=0.1), values(H, scale=0.1), values(T, H, seed=1)
    calls = {
        "glmx": lambda: glmx.ops.layer_norm(x, weight, bias, EPS),
        "torch": lambda: F.layer_norm(x, (H,), weight, bias, EPS),
    }
    if phase == "backward":
        calls["torch"] = lambda: in_fp32(x, weight, bias)
        leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
        calls = {name: harness.backward(call, leaves, dy) for name, call in calls.items()}
    harness.measure(
        benchmark,
        record_row,
        f"layer_norm {phase}, {T} x {H}",
        "layer_norm",
        calls.pop("glmx"),
        calls,
        touched=(3 if phase == "backward" else 2) * x.numel() * x.element_size(),
    )
