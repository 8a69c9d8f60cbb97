"""embedding against torch: GLM-5's table, 154,880 rows of 6144.

    pytest bench/ops/bench_embedding.py            (OMP_NUM_THREADS sets the threads)

The backward adds to fp32 sums that lie ready, as in the trainer; the peer of that is `index_add_`. Ids are drawn
evenly, and only the rows that they name are filled: the others are never touched, so that tables cost no memory.
"""

from __future__ import annotations

import harness
import pytest
import torch
from harness import values
from torch.nn import functional as F

import glmx.ops

VOCABULARY, HIDDEN = 154_880, 6144


def drawn(benchmark, T: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [T] and a table in which the rows that they name are filled."""
    T, V, H = (min(T, 5), 50, 64) if benchmark.disabled else (T, VOCABULARY, HIDDEN)
    ids = torch.randint(V, (T,), generator=torch.Generator().manual_seed(T))
    table = torch.empty(V, H, dtype=dtype)
    table[ids] = values(T, H, dtype=dtype)
    return ids, table


@pytest.mark.parametrize("T", [1, 16, 2048])
def test_forward(benchmark, record_row, T: int) -> None:
    ids, weight = drawn(benchmark, T, torch.bfloat16)
    harness.measure(
        benchmark,
        record_row,
        f"embedding forward, {T} of {len(weight)} x {weight.shape[1]}",
        "embedding",
        lambda: glmx.ops.embedding(ids, weight),
        {"torch": lambda: F.embedding(ids, weight)},
        touched=2 * len(ids) * weight.shape[1] * weight.element_size(),
    )


def test_backward(benchmark, record_row) -> None:
    (ids, weight), (_, sums) = (drawn(benchmark, 2048, dtype) for dtype in (torch.bfloat16, torch.float32))
    dy = values(len(ids), weight.shape[1], seed=1)
    weight.requires_grad_().main_grad = sums  # type: ignore[attr-defined]
    y = glmx.ops.embedding(ids, weight)

    def ours() -> None:
        y.backward(dy, retain_graph=True)

    def peer() -> None:
        sums.index_add_(0, ids, dy.float())

    named, made = ids.unique(), []
    for call in (ours, peer):
        sums[named] = 0
        call()
        made.append(sums[named])
    harness.agree("torch", *made)
    if benchmark.disabled:
        return
    harness.compare(
        benchmark,
        record_row,
        f"embedding backward, {len(ids)} of {len(weight)} x {weight.shape[1]}, added",
        "embedding",
        ours,
        {"torch": peer},
        flop=0,
        touched=dy.numel() * (2 + 4 + 4),
        rounds=15,
        keep_memory=True,
    )
