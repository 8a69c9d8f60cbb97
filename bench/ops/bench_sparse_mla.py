"""sparse_mla against torch's SDPA: GLM-5, 64 heads of 576/512, 2048 listed keys of 32,768.

    pytest bench/ops/bench_sparse_mla.py            (OMP_NUM_THREADS sets the threads)

The peer gathers the listed latents of each token (2.4 MB) and calls SDPA with the heads as rows of one latent head,
torch's strong form: 64 tokens at a time, so that many tokens need not hold theirs at once. A training step is forward
and backward, of 512 tokens; its peer goes through autograd in the same parts. Lists are drawn evenly.
"""

from __future__ import annotations

import harness
import pytest
import torch
from harness import values

import glmx.ops

HEADS, LATENT, ROTARY, TOP_K, KEYS = 64, 512, 64, 2048, 32768
SMALL = (3, 32, 8, 16, 40)
PART = 64  # tokens


def by_sdpa(q: torch.Tensor, kv: torch.Tensor, lists: torch.Tensor, scale: float, v_dim: int) -> torch.Tensor:
    keys = kv.index_select(0, lists.flatten()).view(len(q), 1, lists.shape[1], -1)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return sdpa(q[:, None], keys, keys[..., :v_dim], scale=scale)[:, 0]


@pytest.mark.parametrize(
    ("phase", "T", "rounds"), [("forward", 1, 51), ("forward", 16, 7), ("forward", 2048, 3), ("step", 512, 3)]
)
def test_sparse_mla(benchmark, record_row, phase: str, T: int, rounds: int) -> None:
    A, latent, rotary, top_k, S = SMALL if benchmark.disabled else (HEADS, LATENT, ROTARY, TOP_K, KEYS)
    T = min(T, 5) if benchmark.disabled else T
    q, kv, d_out = values(T, A, latent + rotary), values(S, latent + rotary), values(T, A, latent, seed=1)
    chances = torch.rand(T, S, generator=torch.Generator().manual_seed(T)).tril_(S - T)  # of what a token sees
    lists = chances.topk(top_k).indices.sort().values
    short, scale = lists.int(), (192 + rotary) ** -0.5
    where = {
        "cu_seqlens_q": torch.tensor([0, T], dtype=torch.int32),
        "seq_lens": torch.tensor([S], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, S], dtype=torch.int32),
    }

    def ours() -> torch.Tensor:
        return glmx.ops.sparse_mla(q, kv, short, **where, scale=scale, v_dim=latent)

    def peer() -> torch.Tensor:
        parts = zip(q.split(PART), lists.split(PART), strict=True)
        return torch.cat([by_sdpa(q_part, kv, listed, scale, latent) for q_part, listed in parts])

    def our_step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(ours(), (q, kv), d_out)

    def peer_step() -> tuple[torch.Tensor, ...]:
        d_q, d_kv = [], torch.zeros_like(kv, dtype=torch.float32)
        for q_part, listed, d_part in zip(q.split(PART), lists.split(PART), d_out.split(PART), strict=True):
            out = by_sdpa(q_part, kv, listed, scale, latent)
            d_q_part, d_kv_part = torch.autograd.grad(out, (q_part, kv), d_part)
            d_q.append(d_q_part)
            d_kv += d_kv_part
        return torch.cat(d_q), d_kv.to(kv.dtype)

    if phase == "step":
        q.requires_grad_()
        kv.requires_grad_()
    products = 4 * (latent + rotary) + 3 * latent if phase == "step" else 2 * latent + rotary
    harness.measure(
        benchmark,
        record_row,
        f"sparse_mla {phase}, {T} x {A} x {latent + rotary}/{latent}, {top_k} of {S} keys",
        "sparse_mla",
        our_step if phase == "step" else ours,
        {"torch SDPA": peer_step if phase == "step" else peer},
        flop=2 * T * top_k * A * products,
        touched=2 * (min(T * top_k, S) * (latent + rotary) + q.numel() + d_out.numel()),
        bound=2**-6,  # probabilities are rounded to bf16 against other maxima
        rounds=rounds,
    )
