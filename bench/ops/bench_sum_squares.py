"""sum_squares against torch: the gradient of GLM-4.5-Air's q_proj, 12,288 x 4096, and those of its 46 layers' norms.

    pytest bench/ops/bench_sum_squares.py            (OMP_NUM_THREADS sets the threads)

The peer is the square of the norm in fp64, by what `clip_grad_norm_` calls. In fp32, its own choice, that is no peer:
fifty million squares come out 0.8 % too small.
"""

from __future__ import annotations

import harness
import pytest
import torch
from harness import values

import glmx.ops

SHAPES = {"q_proj": [(12288, 4096)], "norms": [(4096,)] * 92}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shapes", SHAPES)
def test_sum_squares(benchmark, record_row, shapes: str, dtype: torch.dtype) -> None:
    given = [(9, 70)] * len(SHAPES[shapes]) if benchmark.disabled else SHAPES[shapes]
    tensors = [values(*shape, dtype=dtype, seed=i) for i, shape in enumerate(given)]

    def by_norm() -> torch.Tensor:
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64))).square()

    harness.measure(
        benchmark,
        record_row,
        f"sum_squares {shapes}, {'bf16' if dtype == torch.bfloat16 else 'fp32'}",
        "sum_squares",
        lambda: glmx.ops.sum_squares(tensors),
        {"torch fp64": by_norm},
        touched=sum(x.numel() * x.element_size() for x in tensors),
        dtype="bf16" if dtype == torch.bfloat16 else "fp32",
    )
