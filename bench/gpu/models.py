"""The layers whose shapes the benchmarks of this folder have, and the routed experts of one as torch computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from timing import Options, normal
from torch.nn import functional as F


class Layer(NamedTuple):
    hidden: int
    width: int  # of one expert
    experts: int
    top_k: int


LAYERS = {
    "GLM-4.5-Air": Layer(4096, 1408, 128, 8),
    "GLM-4.5": Layer(5120, 1536, 160, 8),
    "GLM-5": Layer(6144, 2048, 256, 8),
}
TINY = {"tiny": Layer(64, 48, 8, 2)}


def layers(run: Options) -> dict[str, Layer]:
    return TINY if run.small else LAYERS


def weights(layer: Layer, run: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up_proj [E, 2 I, H] and down_proj [E, H, I]: random, outputs of about unit size."""
    H, I, E, _ = layer
    return normal(E, 2 * I, H, run=run, scale=H**-0.5), normal(E, H, I, run=run, scale=I**-0.5)


def routed(layer: Layer, tokens: int, run: Options) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, H], weights fp32 [T, K] and experts int32 [T, K], drawn evenly."""
    ids = torch.rand(tokens, layer.experts, device=run.device).topk(layer.top_k).indices.int()
    weights_TK = torch.rand(tokens, layer.top_k, device=run.device).softmax(-1)
    return normal(tokens, layer.hidden, run=run), weights_TK, ids


def ends_of(flat: torch.Tensor, E: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The order that groups pairs by expert, and where each expert's rows end: no synchronisation, for graphs."""
    ordered, order = flat.sort(stable=True)
    experts = torch.arange(E, device=flat.device, dtype=ordered.dtype)
    return order, torch.searchsorted(ordered, experts, right=True).int()


def grouped(gate_up: torch.Tensor, down: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The layer in torch's grouped_mm."""
    E = gate_up.shape[0]

    def call(x: torch.Tensor, weights_TK: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        T, K = ids.shape
        order, ends = ends_of(ids.flatten(), E)
        h = F.grouped_mm(x[order // K], gate_up.transpose(1, 2), offs=ends)
        gate, up = h.chunk(2, -1)
        out = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
        rows = torch.empty_like(out).index_copy(0, order, out).view(T, K, -1)
        return (rows * weights_TK.to(rows.dtype)[..., None]).sum(1)

    return call
