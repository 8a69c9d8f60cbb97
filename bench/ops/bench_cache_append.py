"""cache_append against torch: the latents of GLM-5, 576 wide, into the caches of 16 layers in turn.

    pytest bench/ops/bench_cache_append.py            (OMP_NUM_THREADS sets the threads)

A call appends as a step does, layer by layer, so that 2048 tokens exceed the CPU's caches. Slots are those of pages in
any order. The peers are `index_copy_` and an assignment by index.
"""

from __future__ import annotations

import harness
import pytest
import torch
from harness import values

import glmx.ops

LAYERS, ROWS, WIDTH, PAGE = 16, 8192, 576, 64


@pytest.mark.parametrize("T", [1, 16, 2048])
def test_cache_append(benchmark, record_row, T: int) -> None:
    layers, rows = (2, 256) if benchmark.disabled else (LAYERS, ROWS)
    T = min(T, rows)
    pages = torch.randperm(rows // PAGE, generator=torch.Generator().manual_seed(0))
    slots = (pages[:, None] * PAGE + torch.arange(PAGE)).flatten()[:T]
    caches = [torch.zeros(rows, WIDTH, dtype=torch.bfloat16) for _ in range(layers)]
    new = [values(T, WIDTH, seed=layer) for layer in range(layers)]

    def ours() -> list[torch.Tensor]:
        return [glmx.ops.cache_append(cache, x, slots) for cache, x in zip(caches, new, strict=True)]

    def by_index_copy() -> list[torch.Tensor]:
        return [cache.index_copy_(0, slots, x) for cache, x in zip(caches, new, strict=True)]

    def by_assignment() -> list[torch.Tensor]:
        for cache, x in zip(caches, new, strict=True):
            cache[slots] = x
        return caches

    peers = {"torch index_copy_": by_index_copy, "torch, assigned": by_assignment}
    for call in (ours, *peers.values()):
        for cache in caches:
            cache.zero_()
        assert all(torch.equal(cache[slots], x) for cache, x in zip(call(), new, strict=True))
    harness.measure(
        benchmark,
        record_row,
        f"cache_append {T} x {WIDTH}, {layers} layers",
        "cache_append",
        ours,
        peers,
        touched=2 * layers * T * WIDTH * 2,
    )
