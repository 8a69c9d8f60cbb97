"""The routed experts of a MoE layer: forward, and forward with backward, against torch, transformers and kt-kernel.

    pytest bench/e2e/bench_moe.py            (OMP_NUM_THREADS sets the threads)

One layer's experts from given router results: plan, gather, gate-up product with SiLU, down product, weighted sum.
"small" has 32 experts of 2048 x 1408, top-8; "wide" 64 experts of 4096 x 1408, top-8. The layers of released models are
cut to fewer experts with as many rows each (bench/moe_layers.py); "T=32 for 256" is what an eighth of the experts sees
of 256 tokens.
Peers: the same layer in `torch.nn.functional.grouped_mm`; oneDNN's linear over weights that were packed beforehand,
expert by expert (forward alone, by private names of torch); transformers' own layer with its grouped_mm experts; and
kt-kernel's over weights that it packed beforehand (bench/moe_kt.py), where it is installed and has bf16 experts for the
CPU: 0.7.2 has them for AMX, AVX-512 and AVX2. Two peers keep packed copies, so that GLM-5's rows take 8 GB.
A backward makes the gradients of x and of both stacks of weights: ours is added to fp32 sums that lie ready, as in the
trainer, theirs are new bf16 tensors, as after `zero_grad(set_to_none=True)`.
"""

from __future__ import annotations

from collections.abc import Callable

import harness
import moe_kt
import moe_layers
import pytest
import torch


@pytest.fixture(scope="module")
def experts() -> harness.OneAtATime:
    """experts(shape): the layer."""
    return harness.OneAtATime(moe_layers.make)


@pytest.fixture(scope="module")
def kt():
    """kt(shape): the layer in kt-kernel with torch's number of threads; None where it does not run."""
    running = harness.OneAtATime(lambda shape, threads: moe_kt.start(shape), lambda peer: peer and peer.close())
    yield lambda shape: running(shape, torch.get_num_threads())
    running.close()


def measure(
    benchmark, record_row, name: str, calls: dict[str, Callable], flop: float, touched: float, rounds: int
) -> None:
    if benchmark.disabled:
        return
    peers = {peer: call for peer, call in calls.items() if peer != "glmx"}
    harness.compare(
        benchmark,
        record_row,
        name,
        "grouped_gemm",
        calls["glmx"],
        peers,
        flop=flop,
        touched=touched,
        rounds=rounds,
        rest={"kt-kernel": moe_kt.REST},
    )


MODELS = ("GLM-4.5-Air", "GLM-4.5", "GLM-5", "GLM-4.7-Flash")


@torch.no_grad()
@pytest.mark.parametrize(
    ("shape", "tokens", "rounds"),
    [
        *[("small", 1, 15), ("small", 16, 9), ("small", 256, 7), ("small", 2048, 3), ("wide", 1, 15), ("wide", 256, 3)],
        *[(model, tokens, rounds) for model in MODELS for tokens, rounds in ((1, 9), (16, 5), (256, 3))],
    ],
)
def test_forward(benchmark, record_row, experts, kt, shape: str, tokens: int, rounds: int) -> None:
    if benchmark.disabled:
        shape, tokens = "tiny", min(tokens, 32)
    layer, twin = experts(shape), kt(shape)
    x, weights, ids = moe_layers.routed(layer, moe_layers.tokens_of(shape, tokens))
    stacks = moe_layers.stacks(layer)
    layers = {
        "glmx": layer.ours,
        "torch grouped_mm": moe_layers.grouped(*stacks),
        "torch packed": moe_layers.packed(*stacks),
        "transformers": moe_layers.transformers_experts(layer),
    }
    calls: dict[str, Callable] = {name: lambda call=call: call(x, weights, ids) for name, call in layers.items()}
    expected = calls["glmx"]()
    for name, call in calls.items():
        moe_layers.check(name, expected, call())
    if twin:
        moe_layers.check("kt-kernel", expected, twin.output(len(x), layer.H))
        calls["kt-kernel"] = twin.run
    name = f"MoE forward, {moe_layers.title(shape, tokens)}"
    measure(benchmark, record_row, name, calls, *moe_layers.work(layer, ids), rounds)


@pytest.mark.parametrize(("tokens", "rounds"), [(256, 3), (2048, 2)])
def test_backward(benchmark, record_row, experts, tokens: int, rounds: int) -> None:
    shape = "small"
    if benchmark.disabled:
        shape, tokens = "tiny", min(tokens, 32)
    layer = experts(shape)
    x, weights, ids = moe_layers.routed(layer, tokens)
    dy, stacks = harness.values(tokens, layer.H), (layer.ours.gate_up_proj, layer.ours.down_proj)

    def step(forward: moe_layers.Layer) -> tuple[torch.Tensor, ...]:
        given = x.clone().requires_grad_()
        for stack in stacks:
            stack.grad = None
        forward(given, weights, ids).backward(dy)
        return (given.grad, *(stack.grad for stack in stacks if stack.grad is not None))

    sums = [torch.zeros(stack.shape) for stack in stacks]

    def ours() -> tuple[torch.Tensor, ...]:
        for stack, main_grad in zip(stacks, sums, strict=True):
            stack.main_grad = main_grad
        try:
            return (*step(layer.ours), *sums)
        finally:
            for stack in stacks:
                del stack.main_grad

    torch_layer, transformers_layer = moe_layers.grouped(*stacks), moe_layers.transformers_experts(layer)
    calls = {
        "glmx": ours,
        "torch grouped_mm": lambda: step(torch_layer),
        "transformers": lambda: step(transformers_layer),
    }
    expected = calls["glmx"]()
    for name, call in calls.items():
        for mine, theirs in zip(expected, call() if name != "glmx" else expected, strict=True):
            moe_layers.check(name, mine, theirs)
    flop, _ = moe_layers.work(layer, ids)
    touched = len(ids.unique()) * layer.H * layer.I * 3.0 * (2 + 2 + 8)
    name = f"MoE forward and backward, {shape}, T={tokens}"
    measure(benchmark, record_row, name, calls, 3 * flop, touched, rounds)
