"""The routed experts of a MoE layer: forward, and forward with backward, against torch and transformers.

    pytest bench/e2e/bench_moe.py            (OMP_NUM_THREADS sets the threads)

One layer's experts from given router results: plan, gather, gate-up product with SiLU, down product, weighted sum.
"small" has 32 experts of 2048 x 1408, top-8; "wide" 64 experts of 4096 x 1408, top-8 (GLM-4.5-Air has 128 of them).
Peers: the same layer in `torch.nn.functional.grouped_mm`; oneDNN's linear over weights that were packed beforehand,
expert by expert (forward alone, by private names of torch); transformers' own layer with its grouped_mm experts. A
backward makes the gradients of x and of both stacks of weights: ours is added to fp32 sums that lie ready, as in the
trainer, theirs are new bf16 tensors, as after `zero_grad(set_to_none=True)`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import harness
import pytest
import torch
from harness import values
from torch.nn import functional as F

from glmx.layers.moe import Experts

SHAPES = {"small": (2048, 1408, 32, 8), "wide": (4096, 1408, 64, 8), "tiny": (64, 48, 8, 2)}


@pytest.fixture(scope="module")
def experts():
    """experts(shape): glmx's experts and transformers' with the same weights, of one shape at a time."""
    made: dict[str, SimpleNamespace] = {}

    def make(shape: str) -> SimpleNamespace:
        if shape not in made:
            made.clear()
            made[shape] = both(shape)
        return made[shape]

    return make


def both(shape: str) -> SimpleNamespace:
    from transformers import Glm4MoeConfig
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts

    H, I, E, K = SHAPES[shape]
    sizes = {"hidden_size": H, "moe_intermediate_size": I, "n_routed_experts": E, "num_experts_per_tok": K}
    ours = Experts(SimpleNamespace(**sizes), torch.bfloat16, torch.device("cpu"))
    with torch.no_grad():
        ours.gate_up_proj.copy_(values(E, 2 * I, H, scale=H**-0.5))
        ours.down_proj.copy_(values(E, H, I, scale=I**-0.5))
    config = Glm4MoeConfig(**sizes, num_local_experts=E)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        theirs = Glm4MoeExperts(config)
    theirs.gate_up_proj, theirs.down_proj = ours.gate_up_proj, ours.down_proj
    return SimpleNamespace(ours=ours, theirs=theirs, H=H, I=I, E=E, K=K)


def routed(layer: SimpleNamespace, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, H], weights fp32 [T, K] and experts int32 [T, K], drawn evenly."""
    draw = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, layer.E, generator=draw).topk(layer.K).indices.int()
    return values(tokens, layer.H), torch.rand(tokens, layer.K, generator=draw).softmax(-1), ids


def grouped(layer: SimpleNamespace, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The layer in torch's grouped_mm."""
    flat = ids.flatten().long()
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=layer.E).cumsum(0).int()
    up = F.grouped_mm(x[order // layer.K], layer.ours.gate_up_proj.transpose(1, 2), offs=ends)
    gate, up = up.chunk(2, -1)
    down = F.grouped_mm(F.silu(gate) * up, layer.ours.down_proj.transpose(1, 2), offs=ends)
    rows = torch.empty_like(down).index_copy(0, order, down)
    return (rows.view(*ids.shape, -1) * weights.to(rows.dtype)[..., None]).sum(1)


def packed(layer: SimpleNamespace) -> Callable[..., torch.Tensor]:
    """The layer expert by expert, its weights packed by oneDNN."""
    pack, linear = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    stacks = (layer.ours.gate_up_proj.detach(), layer.ours.down_proj.detach())
    up_down = [[pack(w, None) for w in stack] for stack in stacks]

    def call(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(len(x), layer.H)
        for e in ids.unique().tolist():
            token, k = (ids == e).nonzero(as_tuple=True)
            gate, up = linear(x[token], up_down[0][e], None, "none", [], "").chunk(2, -1)
            rows = linear(F.silu(gate) * up, up_down[1][e], None, "none", [], "")
            out.index_add_(0, token, rows.float() * weights[token, k, None])
        return out.to(x.dtype)

    return call


def check(name: str, expected: torch.Tensor, found: torch.Tensor) -> None:
    error = (expected.float() - found.float()).norm() / expected.float().norm()
    assert error <= 2**-6, f"{name}: {error:.2e} away from glmx"  # bf16, rounded at other places


def measure(
    benchmark, record_row, name: str, calls: dict[str, Callable], flop: float, touched: float, rounds: int
) -> None:
    if benchmark.disabled:
        return
    peers = {peer: call for peer, call in calls.items() if peer != "glmx"}
    harness.compare(
        benchmark, record_row, name, "grouped_gemm", calls["glmx"], peers, flop=flop, touched=touched, rounds=rounds
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("shape", "tokens", "rounds"),
    [("small", 1, 15), ("small", 16, 9), ("small", 256, 7), ("small", 2048, 3), ("wide", 1, 15), ("wide", 256, 3)],
)
def test_forward(benchmark, record_row, experts, shape: str, tokens: int, rounds: int) -> None:
    if benchmark.disabled:
        shape, tokens = "tiny", min(tokens, 32)
    layer = experts(shape)
    x, weights, ids = routed(layer, tokens)
    run_packed, long_ids = packed(layer), ids.long()
    calls = {
        "glmx": lambda: layer.ours(x, weights, ids),
        "torch grouped_mm": lambda: grouped(layer, x, weights, ids),
        "torch packed": lambda: run_packed(x, weights, ids),
        "transformers": lambda: layer.theirs(x, long_ids, weights),
    }
    expected = calls["glmx"]()
    for name, call in calls.items():
        check(name, expected, call())
    flop = 6.0 * tokens * layer.K * layer.H * layer.I
    touched = 6.0 * len(ids.unique()) * layer.H * layer.I
    name = f"MoE forward, {shape}, T={tokens}"
    measure(benchmark, record_row, name, calls, flop, touched, rounds)


@pytest.mark.parametrize(("tokens", "rounds"), [(256, 3), (2048, 2)])
def test_backward(benchmark, record_row, experts, tokens: int, rounds: int) -> None:
    shape = "small"
    if benchmark.disabled:
        shape, tokens = "tiny", min(tokens, 32)
    layer = experts(shape)
    x, weights, ids = routed(layer, tokens)
    dy, long_ids, stacks = values(tokens, layer.H), ids.long(), (layer.ours.gate_up_proj, layer.ours.down_proj)

    def step(forward: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        given = x.clone().requires_grad_()
        for stack in stacks:
            stack.grad = None
        forward(given).backward(dy)
        return (given.grad, *(stack.grad for stack in stacks if stack.grad is not None))

    sums = [torch.zeros(stack.shape) for stack in stacks]

    def ours() -> tuple[torch.Tensor, ...]:
        for stack, main_grad in zip(stacks, sums, strict=True):
            stack.main_grad = main_grad
        try:
            return (*step(lambda given: layer.ours(given, weights, ids)), *sums)
        finally:
            for stack in stacks:
                del stack.main_grad

    calls = {
        "glmx": ours,
        "torch grouped_mm": lambda: step(lambda given: grouped(layer, given, weights, ids)),
        "transformers": lambda: step(lambda given: layer.theirs(given, long_ids, weights)),
    }
    expected = calls["glmx"]()
    for name, call in calls.items():
        for mine, theirs in zip(expected, call() if name != "glmx" else expected, strict=True):
            check(name, mine, theirs)
    flop = 18.0 * tokens * layer.K * layer.H * layer.I
    touched = len(ids.unique()) * layer.H * layer.I * 3.0 * (2 + 2 + 8)
    name = f"MoE forward and backward, {shape}, T={tokens}"
    measure(benchmark, record_row, name, calls, flop, touched, rounds)
