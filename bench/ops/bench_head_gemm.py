"""head_gemm against torch's bmm: W_UK and W_UV of GLM-5, 64 heads, 192 -> 512 and 512 -> 256.

    pytest bench/ops/bench_head_gemm.py            (OMP_NUM_THREADS sets the threads)

W_UK is applied to the first 192 of the 256 values of each query head, and both weights are rows of one kv_b_proj, read
where they lie. Few tokens go through the weights of 4 layers in turn, since those of one stay in the caches. The
peer's weights are tensors of their own, made beforehand: over a part of another's rows bmm takes up to 50 times as
long. It leaves its result in the order of heads. The backward makes the gradients of x and of the weight.
"""

from __future__ import annotations

import harness
import pytest
import torch
from harness import values

import glmx.ops

A, NOPE, V_DIM, LATENT = 64, 192, 256, 512


def by_bmm(x: torch.Tensor, w: torch.Tensor, transposed: bool) -> torch.Tensor:
    return torch.bmm(x.transpose(0, 1), w if transposed else w.transpose(1, 2)).transpose(0, 1)


@pytest.mark.parametrize(
    ("phase", "T", "layers"), [("forward", 1, 4), ("forward", 16, 4), ("forward", 2048, 1), ("backward", 2048, 1)]
)
@pytest.mark.parametrize("weight", ["W_UK", "W_UV"])
def test_head_gemm(benchmark, record_row, weight: str, phase: str, T: int, layers: int) -> None:
    heads, nope, v_dim, latent = A, NOPE, V_DIM, LATENT
    if benchmark.disabled:
        T, heads, nope, v_dim, latent = min(T, 5), 3, 24, 32, 64
    transposed = weight == "W_UK"
    stacks = [values(heads, nope + v_dim, latent, scale=latent**-0.5, seed=layer) for layer in range(layers)]
    ws = [stack[:, :nope] if transposed else stack[:, nope:] for stack in stacks]
    theirs = [w.contiguous() for w in ws]
    x = values(T, heads, nope + 64)[..., :nope] if transposed else values(T, heads, latent)
    N = latent if transposed else v_dim
    calls = {
        "glmx": lambda: [glmx.ops.head_gemm(x, w, transposed=transposed) for w in ws],
        "torch bmm": lambda: [by_bmm(x, w, transposed) for w in theirs],
    }
    if phase == "backward":
        x.requires_grad_()
        leaves, dy = (
            {"glmx": ws[0].requires_grad_(), "torch bmm": theirs[0].requires_grad_()},
            values(T, heads, N, seed=1),
        )
        calls = {name: harness.backward(call, [x, leaves[name]], dy) for name, call in calls.items()}
    once = 2 if phase == "backward" else 1
    harness.measure(
        benchmark,
        record_row,
        f"head_gemm {phase}, {weight}, {T} x {heads}, {x.shape[-1]} -> {N}" + f", {layers} layers" * (layers > 1),
        "head_gemm",
        calls.pop("glmx"),
        calls,
        flop=once * layers * 2 * x.numel() * N,
        touched=once * layers * 2 * (ws[0].numel() + x.numel() + T * heads * N),
    )
