"""What the benchmarks of MoE layers share: shapes, weights, routings, and the layer as torch and transformers run it.

"small" and "wide" are shapes between those of the field; the others are released models' layers, with as many of their
experts as fit in 2.5 GB. Such a layer gets its share of the tokens too, so that an expert sees as many rows as in the
full layer: 32 of 256 experts, an eighth of the tokens, one at least.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
from harness import values
from torch.nn import functional as F

from glmx.layers.moe import MoE

Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # x, weights, ids -> out


class Shape(NamedTuple):
    hidden: int
    width: int
    experts: int
    top_k: int
    of: int  # the experts of the full layer


SHAPES = {
    "small": Shape(2048, 1408, 32, 8, 32),
    "wide": Shape(4096, 1408, 64, 8, 64),
    "GLM-4.5-Air": Shape(4096, 1408, 32, 8, 128),
    "GLM-4.5": Shape(5120, 1536, 40, 8, 160),
    "GLM-5": Shape(6144, 2048, 32, 8, 256),
    "GLM-4.7-Flash": Shape(2048, 1536, 64, 4, 64),
    "tiny": Shape(64, 96, 8, 2, 8),
    "tiny, whole groups": Shape(256, 128, 8, 2, 8),  # of 128 columns, which kt-kernel's formats ask for
}


def make(name: str) -> SimpleNamespace:
    """The MoE layer of a shape, `ours` its experts; the same values every time, in every process."""
    H, I, E, K, _ = SHAPES[name]
    config = SimpleNamespace(
        hidden_size=H,
        moe_intermediate_size=I,
        n_routed_experts=E,
        num_experts_per_tok=K,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )
    moe = MoE(config, torch.bfloat16, torch.device("cpu")).eval()
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(values(*parameter.shape, scale=parameter.shape[-1] ** -0.5))
    return SimpleNamespace(moe=moe, ours=moe.experts, H=H, I=I, E=E, K=K)


def stacks(layer: SimpleNamespace, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.ours.gate_up_proj.detach().to(dtype), layer.ours.down_proj.detach().to(dtype)


def tokens_of(name: str, tokens: int) -> int:
    """How many tokens give a cut layer the rows per expert that `tokens` give the full one."""
    return max(1, tokens * SHAPES[name].experts // SHAPES[name].of)


def title(name: str, tokens: int) -> str:
    """The words of a row: "GLM-5, 32 of 256 experts, T=32 for 256"."""
    shape, run = SHAPES[name], tokens_of(name, tokens)
    cut = f", {shape.experts} of {shape.of} experts" * (shape.experts < shape.of)
    return f"{name}{cut}, T={run}" + f" for {tokens}" * (run < tokens)


def routed(layer: SimpleNamespace, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, H], weights fp32 [T, K] and experts int32 [T, K], drawn evenly."""
    draw = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, layer.E, generator=draw).topk(layer.K).indices.int()
    return values(tokens, layer.H), torch.rand(tokens, layer.K, generator=draw).softmax(-1), ids


def work(layer: SimpleNamespace, ids: torch.Tensor) -> tuple[float, float]:
    """Flop of a forward, and the bytes of the experts that it must read."""
    return 6.0 * ids.numel() * layer.H * layer.I, 6.0 * len(ids.unique()) * layer.H * layer.I


def grouped(gate_up: torch.Tensor, down: torch.Tensor) -> Layer:
    """The layer in torch's grouped_mm, in the dtype of the weights."""
    E = len(gate_up)

    def call(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        flat = ids.flatten().long()
        order = flat.argsort(stable=True)
        ends = torch.bincount(flat, minlength=E).cumsum(0).int()
        given = x.to(gate_up.dtype)[order // ids.shape[1]]
        gate, up = F.grouped_mm(given, gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
        out = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
        rows = torch.empty_like(out).index_copy(0, order, out)
        return (rows.view(*ids.shape, -1) * weights.to(rows.dtype)[..., None]).sum(1).to(x.dtype)

    return call


def packed(gate_up: torch.Tensor, down: torch.Tensor) -> Layer:
    """The layer expert by expert, its weights packed by oneDNN."""
    pack, linear = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    dtype, H = gate_up.dtype, down.shape[1]
    up_down = [[pack(w, None) for w in stack] for stack in (gate_up, down)]

    def call(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        out, given = torch.zeros(len(x), H), x.to(dtype)
        for e in ids.unique().tolist():
            token, k = (ids == e).nonzero(as_tuple=True)
            gate, up = linear(given[token], up_down[0][e], None, "none", [], "").chunk(2, -1)
            rows = linear(F.silu(gate) * up, up_down[1][e], None, "none", [], "")
            out.index_add_(0, token, rows.float() * weights[token, k, None])
        return out.to(x.dtype)

    return call


def transformers_experts(layer: SimpleNamespace) -> Layer:
    """transformers' experts over the same weights, with its grouped_mm."""
    from transformers import Glm4MoeConfig
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts

    config = Glm4MoeConfig(
        hidden_size=layer.H,
        moe_intermediate_size=layer.I,
        n_routed_experts=layer.E,
        num_experts_per_tok=layer.K,
        num_local_experts=layer.E,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        theirs = Glm4MoeExperts(config)
    theirs.gate_up_proj, theirs.down_proj = layer.ours.gate_up_proj, layer.ours.down_proj
    return lambda x, weights, ids: theirs(x, ids.long(), weights)


def check(name: str, expected: torch.Tensor, found: torch.Tensor, bound: float = 2**-6) -> None:
    """By norms; the default bound is for bf16, rounded at other places."""
    error = (expected.float() - found.float()).norm() / expected.float().norm()
    assert error <= bound, f"{name}: {error:.2e} away from glmx"
