"""The decode path in a CUDA graph: no synchronisation, no copy from the host; a replay equals the eager call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from glmx import ops
from tests.gpu.device import need_cuda, normal
from tests.ops.cases import same_bits

DEVICE = need_cuda()
H, I, E, K = 4096, 1408, 32, 8


def captured(call: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...]]:
    """The graph of one call, made after a call on a side stream, as torch asks for, and its outputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = call()
    return graph, outs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 16])
def test_a_decode_step_replays(tokens: int, dtype: torch.dtype) -> None:
    """norm, router, experts and a dense projection of one layer; the replays have inputs that the capture did not."""
    norm = normal(H, seed=1, dtype=dtype)
    router, bias = normal(E, H, seed=2, dtype=dtype, scale=H**-0.5), torch.zeros(E, device=DEVICE)
    gate_up = normal(E, 2 * I, H, seed=3, dtype=dtype, scale=H**-0.5)
    down = normal(E, H, I, seed=4, dtype=dtype, scale=I**-0.5)
    dense = normal(1000, H, seed=5, dtype=dtype, scale=H**-0.5)
    x, residual = torch.zeros(2, tokens, H, device=DEVICE, dtype=dtype).unbind()

    def step() -> tuple[torch.Tensor, ...]:
        y, total = ops.add_rms_norm(x, residual, norm, 1e-5)
        logits = ops.linear(y, router, out_dtype=torch.float32)
        weights, ids, counts = ops.route_topk(logits, bias, K)
        out = ops.moe_mlp(y, weights, ids, gate_up, down)
        return ops.linear(ops.rms_norm(out, norm, 1e-5), dense), total, weights, ids, counts

    with torch.no_grad():
        graph, outs = captured(step)
        for seed in range(3):
            x.copy_(normal(tokens, H, seed=10 + seed, dtype=dtype))
            residual.copy_(normal(tokens, H, seed=20 + seed, dtype=dtype))
            for out in outs:
                out.fill_(-7)
            graph.replay()
            for name, got, want in zip(("out", "sum", "weights", "ids", "counts"), outs, step(), strict=True):
                assert same_bits(got, want), f"{name} of replay {seed}"


def test_a_training_step_of_the_experts_replays() -> None:
    """Forward and backward with main_grad in one graph."""
    T, dtype = 40, torch.bfloat16
    x = normal(T, 256, seed=1, dtype=dtype).requires_grad_()
    gate_up = normal(4, 192, 256, seed=2, dtype=dtype, scale=1 / 16).requires_grad_()
    down = normal(4, 256, 96, seed=3, dtype=dtype, scale=1 / 10).requires_grad_()
    dy, logits = normal(T, 256, seed=4, dtype=dtype), normal(T, 4, seed=5, dtype=torch.float32)
    bias = torch.zeros(4, device=DEVICE)
    for weight in (gate_up, down):
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)

    def step() -> tuple[torch.Tensor, ...]:
        for weight in (gate_up, down):
            weight.main_grad.zero_()
        x.grad = None
        weights, ids, _ = ops.route_topk(logits, bias, 2)
        out = ops.moe_mlp(x, weights, ids, gate_up, down)
        out.backward(dy)
        return out.detach(), x.grad

    eager = [t.clone() for t in (*step(), gate_up.main_grad, down.main_grad)]
    graph, outs = captured(step)
    graph.replay()
    for got, want in zip((*outs, gate_up.main_grad, down.main_grad), eager, strict=True):
        assert same_bits(got, want)
