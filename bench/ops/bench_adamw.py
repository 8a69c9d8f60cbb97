"""adamw against torch's fused AdamW: one update of 40 million bf16 parameters.

    pytest bench/ops/bench_adamw.py            (OMP_NUM_THREADS sets the threads)

Peers: torch's fused kernel on fp32 masters, then their copy to bf16 and zeroing of the gradients, which together do
what ours does; and the same kernel on bf16 weights, gradients and moments, half of the bytes and no masters.
"""

from __future__ import annotations

import harness
import torch

import glmx.ops

N = 40_000_000
RATES = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8}


def test_update(benchmark, record_row) -> None:
    n = 1000 if benchmark.disabled else N
    grad = torch.full((n,), 0.01)
    ours = [torch.ones(n, dtype=torch.bfloat16), torch.ones(n), torch.zeros(n), torch.zeros(n), grad.clone()]
    theirs = [tensor.clone() for tensor in ours]
    halves = [torch.ones(n, dtype=torch.bfloat16), *(torch.zeros(n, dtype=torch.bfloat16) for _ in range(3))]
    step = torch.ones(())

    def fused(param: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, grad: torch.Tensor) -> None:
        torch._fused_adamw_(
            [param], [grad], [exp_avg], [exp_avg_sq], [], [step], amsgrad=False, maximize=False, **RATES
        )

    def peer() -> None:
        param, master, exp_avg, exp_avg_sq, grad = theirs
        fused(master, exp_avg, exp_avg_sq, grad)
        param.copy_(master)
        grad.zero_()

    def call() -> None:
        glmx.ops.adamw(*ours, updates=1, **RATES)

    call()
    peer()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
    if benchmark.disabled:
        return
    peers = {"torch fused": peer, "torch fused, all bf16": lambda: fused(*halves)}
    name = f"adamw, {n // 10**6} M bf16 parameters"
    harness.compare(benchmark, record_row, name, "adamw", call, peers, flop=14.0 * n, touched=34.0 * n, rounds=7)
