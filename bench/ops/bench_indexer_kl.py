"""indexer_kl against the formula in torch: a step of training, forward and backward.

    pytest bench/ops/bench_indexer_kl.py           (OMP_NUM_THREADS sets the threads)

2048 tokens in sequences of 512, 8 main heads of 96 values, 8 index heads of 32: about what `glmx demo` trains. The peer
is what one would write: per sequence, scores by matrix products, probabilities from lse, log_softmax and autograd; with
lists, over keys that are gathered, and over a mask. Half of the masked peer's products go to waste.
"""

from __future__ import annotations

import harness
import pytest
import torch

import glmx.ops

T, LENGTH, A, DK, HI, DI = 2048, 512, 8, 96, 8, 32
ROUNDS = 7


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def divergence(p: torch.Tensor, scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    log_softmax = scores.masked_fill(~seen, float("-inf")).log_softmax(-1)
    return (torch.xlogy(p, p) - p * log_softmax.masked_fill(~seen, 0.0)).sum(-1)


def torch_masked(index_q, weights, index_k, q, kv, lse, scale, seen_NTS):
    """Every key of a sequence, then a mask."""
    n = T // LENGTH
    index_q, weights, index_k, q, kv, lse = (
        x.view(n, LENGTH, *x.shape[1:]) for x in (index_q, weights, index_k, q, kv, lse)
    )
    with torch.no_grad():
        s = torch.einsum("ntad,nsd->ntas", q, kv).float() * scale
        p = torch.exp(s - lse[..., None]).mean(2).masked_fill(~seen_NTS, 0.0)
    dots = torch.einsum("nthd,nsd->nths", index_q, index_k).relu().float()
    scores = torch.einsum("nths,nth->nts", dots, weights)
    return divergence(p, scores, seen_NTS).flatten()


def torch_gathered(index_q, weights, index_k, q, kv, lse, scale, rows_Tk, listed_Tk):
    """The listed keys alone, gathered for each token."""
    with torch.no_grad():
        s = torch.einsum("tad,tsd->tas", q, kv[rows_Tk]).float() * scale
        p = torch.exp(s - lse[..., None]).mean(1).masked_fill(~listed_Tk, 0.0)
    dots = torch.einsum("thd,tsd->ths", index_q, index_k[rows_Tk]).relu().float()
    return divergence(p, torch.einsum("ths,th->ts", dots, weights), listed_Tk)


@pytest.mark.parametrize("top_k", [None, 64], ids=["all", "k64"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_training_step(benchmark, record_row, dtype: torch.dtype, top_k: int | None) -> None:
    cu = torch.arange(0, T + 1, LENGTH, dtype=torch.int32)
    keys = {"cu_seqlens_q": cu, "seq_lens": cu[1:] - cu[:-1], "cu_seqlens_k": cu, "scale": DK**-0.5}
    leaves = [
        randn(T, HI, DI, dtype=dtype),
        randn(T, HI, seed=1) * (HI * DI) ** -0.5,
        randn(T, DI, dtype=dtype, seed=2),
    ]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    q, kv = randn(T, A, DK, dtype=dtype, seed=3), randn(T, DK, dtype=dtype, seed=4)
    lists = torch.full((T, top_k or LENGTH), -1, dtype=torch.int32)
    for t in range(T):
        seen = t % LENGTH + 1
        listed = torch.randperm(seen, generator=torch.Generator().manual_seed(t))[: lists.shape[1]].sort().values
        lists[t, : len(listed)] = listed.int()
    _, lse = glmx.ops.sparse_mla(q, kv, lists, **keys, v_dim=DK, return_lse=True)
    listed_Tk = lists >= 0
    rows_Tk = lists.long().clamp(min=0) + (torch.arange(T) // LENGTH * LENGTH)[:, None]
    seen_TS = torch.zeros(T, LENGTH, dtype=torch.bool).scatter_(1, lists.long().clamp(min=0), listed_Tk)
    seen_TS[torch.arange(T), lists[:, 0].long()] = True  # a -1, taken as key 0, may have come last
    seen_NTS = seen_TS.view(-1, LENGTH, LENGTH)

    def ours() -> torch.Tensor:
        return glmx.ops.indexer_kl(*leaves, q, kv, lse, **keys, topk_indices=None if top_k is None else lists)

    def step(call):
        def run() -> list[torch.Tensor]:
            for leaf in leaves:
                leaf.grad = None
            kl = call()
            kl.sum().backward()
            return [kl.detach(), *(leaf.grad for leaf in leaves)]

        return run

    constants = (*leaves, q, kv, lse, keys["scale"])
    peers = {"torch, masked": step(lambda: torch_masked(*constants, seen_NTS))}
    if top_k is not None:
        peers["torch, gathered"] = step(lambda: torch_gathered(*constants, rows_Tk, listed_Tk))
    mine = step(ours)
    for name, peer in peers.items():
        for got, want in zip(mine(), peer(), strict=True):
            error, bound = (got.float() - want.float()).norm(), 2**-5 if dtype == torch.bfloat16 else 2**-15
            assert error <= bound * want.float().norm(), name
    if benchmark.disabled:
        return

    harness.compare(
        benchmark,
        record_row,
        f"indexer_kl step {T} of {LENGTH}, {top_k or 'all'} keys, {'bf16' if dtype == torch.bfloat16 else 'fp32'}",
        "indexer_kl",
        mine,
        peers,
        flop=int(listed_Tk.sum()) * 2 * (2 * A * DK + 4 * HI * DI),
        touched=0,
        rounds=ROUNDS,
    )
