"""indexer_topk against torch: prefill and decode at GLM-5's indexer, 32 heads of 128, the best 2048 keys.

    pytest bench/ops/bench_indexer_topk.py            (OMP_NUM_THREADS sets the threads)

The peers are what torch offers: one product of all heads with all keys, relu, the weighted sum over the heads, a causal
mask, topk; in the same dtype, and in fp32, which is the stronger form where the CPU has no bf16 products. They hold
[T, Hi, S] products and [T, S] scores; where these exceed harness.PEER_BYTES, the row says so. Torch's bf16 form takes
minutes for long prompts on such a CPU and is left out there. The flop counted are those of rows that see more than 2048
keys: the others need no scores. The ceilings are measured in the same test (bench/roofline.py).
"""

from __future__ import annotations

import functools

import harness
import pytest
import torch

import glmx.ops
from glmx.reference.indexer_topk import index_scores

HEADS, WIDTH, TOP_K = 32, 128, 2048
SMALL = (4, 24, 64)  # heads, width and top_k where nothing is timed
DTYPE = torch.bfloat16
PEERS = {"torch": torch.bfloat16, "torch fp32": torch.float32}


def values(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def measure(benchmark, record_row, name: str, T: int, keys: int, rounds: int, peers: tuple[str, ...]) -> None:
    """The last T of `keys` tokens, contiguous keys."""
    Hi, Di, top_k = HEADS, WIDTH, TOP_K
    if benchmark.disabled:
        T, keys, (Hi, Di, top_k) = min(T, 16), keys // 32, SMALL
    q, k = values(T, Hi, Di), values(keys, Di)
    weights = values(T, Hi, dtype=torch.float32) * (Hi * Di) ** -0.5
    cu_seqlens_q, cu_seqlens_k = (torch.tensor([0, n], dtype=torch.int32) for n in (T, keys))
    unseen = torch.arange(keys) >= torch.arange(keys - T + 1, keys + 1)[:, None] if T > 1 else None

    def ours() -> torch.Tensor:
        return glmx.ops.indexer_topk(q, weights, k, cu_seqlens_q, cu_seqlens_k[1:], top_k, cu_seqlens_k=cu_seqlens_k)

    def peer(dtype: torch.dtype) -> torch.Tensor:
        products = (q.to(dtype).view(T * Hi, Di) @ k.to(dtype).T).relu_().view(T, Hi, keys)
        scores = (weights.to(dtype)[:, None] @ products)[:, 0]
        if unseen is not None:
            scores.masked_fill_(unseen, float("-inf"))
        return scores.topk(min(top_k, keys), sorted=False).indices

    exact = index_scores(q[-1:], weights[-1:], k, exact=True)[0]
    listed = ours()[-1].long()
    assert len(listed.unique()) == top_k
    assert exact.topk(top_k).values[-1] - exact[listed].min() <= 2**-16 * exact.abs().max()
    if benchmark.disabled:
        for name in peers:
            peer(PEERS[name])
        return

    needed = {name: T * (Hi + 1) * keys * PEERS[name].itemsize for name in peers}
    unfit = {name: size for name, size in needed.items() if size > harness.PEER_BYTES}
    scored = sum(n for n in range(keys - T + 1, keys + 1) if n > top_k)
    harness.compare(
        benchmark,
        record_row,
        f"indexer_topk {name}, {Hi} x {Di}, top-{top_k}, bf16",
        "indexer_topk",
        ours,
        {name: functools.partial(peer, PEERS[name]) for name in peers if name not in unfit},
        flop=2 * scored * Hi * Di,
        touched=keys * Di * k.element_size(),
        rounds=rounds,
        warmup_rounds=0,
        unfit=unfit,
    )


@pytest.mark.parametrize(
    ("tokens", "keys", "rounds", "peers"),
    [
        (512, 4096, 3, tuple(PEERS)),
        (4096, 4096, 3, ("torch fp32",)),
        (512, 32768, 3, ("torch fp32",)),
        (2048, 131072, 1, tuple(PEERS)),
    ],
)
def test_prefill(benchmark, record_row, tokens: int, keys: int, rounds: int, peers: tuple[str, ...]) -> None:
    which = "all" if tokens == keys else f"the last {tokens}"
    measure(benchmark, record_row, f"prefill, {which} of {keys}", tokens, keys, rounds, peers)


@pytest.mark.parametrize("keys", [4096, 32768, 131072])
def test_decode(benchmark, record_row, keys: int) -> None:
    measure(benchmark, record_row, f"decode, {keys} keys", 1, keys, 9, tuple(PEERS))
