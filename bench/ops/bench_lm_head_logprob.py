"""lm_head_logprob against torch: the head of GLM-4.5-Air, 4096 -> 151,552; with many tokens an eighth of it.

    pytest bench/ops/bench_lm_head_logprob.py            (OMP_NUM_THREADS sets the threads)

The peers are a linear and `F.cross_entropy` of its logits in fp32; of all tokens at once, or of 128 at a time, which
keeps the logits near. They round logits to bf16, ours does not. The backward adds the weight's gradient to fp32 sums
that lie ready, as in the trainer; the peer's is a new bf16 tensor. Its products are three times the forward's, the
peer's twice: ours makes the logits again, torch holds them. They are grouped_gemm's, whose kernel names the row.
"""

from __future__ import annotations

import harness
import pytest
import torch
from harness import values
from torch.nn import functional as F

import glmx.ops

HIDDEN, VOCABULARY, SLICE = 4096, 151_552, 18_944
PART = 128  # tokens


def by_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return -F.cross_entropy(F.linear(hidden, weight).float(), ids, reduction="none")


def by_parts(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    parts = zip(hidden.split(PART), ids.split(PART), strict=True)
    return torch.cat([by_cross_entropy(some, weight, of_some) for some, of_some in parts])


def case(benchmark, T: int, V: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [T, H], weight [V, H], ids [T]"""
    T, V, H = (min(T, 5), 1500, 64) if benchmark.disabled else (T, V, HIDDEN)
    ids = torch.randint(V, (T,), generator=torch.Generator().manual_seed(T))
    return values(T, H), values(V, H, scale=H**-0.5), ids


@pytest.mark.parametrize(("T", "V"), [(1, VOCABULARY), (16, VOCABULARY), (2048, SLICE)])
def test_forward(benchmark, record_row, T: int, V: int) -> None:
    given = case(benchmark, T, V)
    hidden, weight, _ = given
    peers = {"torch": lambda: by_cross_entropy(*given)}
    if T > PART:
        peers["torch, in parts"] = lambda: by_parts(*given)
    harness.measure(
        benchmark,
        record_row,
        f"lm_head_logprob forward, {T} x {hidden.shape[1]} -> {len(weight)}",
        "grouped_gemm",
        lambda: glmx.ops.lm_head_logprob(*given).logprob,
        peers,
        flop=2 * len(hidden) * weight.numel(),
        touched=2 * weight.numel(),
        bound=2**-8,  # of the logits that torch rounds
    )


def test_backward(benchmark, record_row) -> None:
    hidden, weight, ids = case(benchmark, 2048, SLICE)
    theirs = weight.clone().requires_grad_()
    sums, d_logprob = torch.zeros(weight.shape), values(len(ids), dtype=torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_().main_grad = sums  # type: ignore[attr-defined]
    logprob = glmx.ops.lm_head_logprob(hidden, weight, ids).logprob

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        hidden.grad = None
        logprob.backward(d_logprob, retain_graph=True)
        return hidden.grad, sums  # type: ignore[return-value]

    peer = harness.backward(lambda: by_cross_entropy(hidden, theirs, ids), [hidden, theirs], d_logprob)
    harness.agree("torch", ours(), peer(), 2**-6)
    if benchmark.disabled:
        return
    harness.compare(
        benchmark,
        record_row,
        f"lm_head_logprob backward, {len(ids)} x {hidden.shape[1]} -> {len(weight)}, added",
        "grouped_gemm",
        ours,
        {"torch": peer},
        flop=6 * len(ids) * weight.numel(),
        touched=10 * weight.numel(),
        rounds=3,
        keep_memory=True,
    )
