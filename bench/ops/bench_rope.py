"""rope against torch: the query heads of GLM-4.5-Air (96 of 128, half of each turned) and of GLM-5 (64, 64 of 256).

    pytest bench/ops/bench_rope.py            (OMP_NUM_THREADS sets the threads)

GLM-5's are the last 64 values of each head, in pairs of neighbours, read where they lie. The peers are slices and a
`cat` or `stack`; for neighbours also complex numbers, in fp32. cos and sin are made beforehand, once for all layers,
and have a row of their own: there the peer's angles are fp64, since fp32 loses them at long positions.
"""

from __future__ import annotations

import harness
import pytest
import torch
from harness import values

import glmx.ops

# heads, width of a head, first and number of the turned values, pairs of neighbours
HEADS = {"air": (96, 128, 0, 64, False), "glm5": (64, 256, 192, 64, True)}
THETA = 1e6


def by_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def by_neighbours(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def by_complex(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


@pytest.mark.parametrize(("phase", "T"), [("forward", 1), ("forward", 16), ("forward", 2048), ("backward", 2048)])
@pytest.mark.parametrize("layer", HEADS)
def test_rope(benchmark, record_row, layer: str, phase: str, T: int) -> None:
    A, width, first, turned, interleaved = HEADS[layer]
    if benchmark.disabled:
        T = min(T, 5)
    cos, sin = glmx.ops.rope_cos_sin(torch.arange(T) + 1000, turned, THETA)
    x = values(T, A, width)[..., first:]
    dy = values(*x.shape, seed=1)
    rounded, turn = (cos.bfloat16()[:, None], sin.bfloat16()[:, None]), torch.complex(cos, sin)[:, None]
    calls = {
        "glmx": lambda: glmx.ops.rope(x, cos, sin, interleaved=interleaved),
        "torch": lambda: (by_neighbours if interleaved else by_halves)(x, *rounded),
    }
    if interleaved:
        calls["torch complex"] = lambda: by_complex(x, turn)
    if phase == "backward":
        x.requires_grad_()
        calls = {name: harness.backward(call, [x], dy) for name, call in calls.items()}
    harness.measure(
        benchmark,
        record_row,
        f"rope {phase}, {layer}, {T} x {A} x {x.shape[-1]}, {turned} turned",
        "rope",
        calls.pop("glmx"),
        calls,
        touched=2 * x.numel() * x.element_size(),
    )


@pytest.mark.parametrize("T", [1, 2048])
def test_cos_sin(benchmark, record_row, T: int) -> None:
    half = 32
    positions, frequencies = torch.arange(T) + 100_000, THETA ** (-torch.arange(half).double() / half)

    def peer() -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions.double()[:, None] * frequencies
        return angles.cos().float(), angles.sin().float()

    harness.measure(
        benchmark,
        record_row,
        f"rope_cos_sin {T} x {half}",
        "rope",
        lambda: glmx.ops.rope_cos_sin(positions, 2 * half, THETA),
        {"torch fp64": peer},
        touched=T * (8 + 2 * half * 4),
    )
