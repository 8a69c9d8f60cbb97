"""R1: the router at the expert counts of released models, and expert_plan. Peers: torch, op by op, in a graph too."""

from __future__ import annotations

from typing import Any

import torch
from timing import Calls, chosen, measure, normal, options, sets

from glmx import ops
from models import ends_of

K = 8


def main() -> None:
    run = options(__doc__)
    shapes = [(E, T) for E in (128, 160, 256) for T in (1, 128, 4096, 8192, 32768)]
    for E, T in [(16, 9)] if run.small else chosen(shapes, run):
        touched = 4.0 * T * (E + 2 * K)
        bias = normal(E, run=run, dtype=torch.float32, scale=0.01)

        def make(E: int = E, T: int = T, bias: torch.Tensor = bias, touched: float = touched) -> dict[str, Calls]:
            inputs = [normal(T, E, run=run, dtype=torch.float32) for _ in range(sets(touched, run))]

            def ours(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
                return ops.route_topk(logits, bias, K, routed_scaling_factor=2.5)

            def torchs(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
                scores = logits.sigmoid()
                ids = torch.topk(scores + bias, K, dim=-1).indices
                weights = scores.gather(1, ids)
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5
                return weights, ids.int()

            return {
                "glmx": [lambda x=x: ours(x) for x in inputs],
                "torch": [lambda x=x: torchs(x) for x in inputs],
            }

        shape: dict[str, Any] = {"T": T, "E": E, "K": K}
        note = "inputs in L2" if T * E * 4 * 16 < 1 << 26 else ""
        measure(run, "R1", "route_topk", shape, make, touched=touched, ceiling="read", graph=True, note=note)
    shapes = [(256, T) for T in (1, 128, 4096, 16384)]
    for E, T in [(16, 9)] if run.small else chosen(shapes, run):
        touched = 4.0 * T * K * 3

        def make_plan(E: int = E, T: int = T, touched: float = touched) -> dict[str, Calls]:
            inputs = [
                torch.rand(T, E, device=run.device).topk(K).indices.int() for _ in range(sets(touched, run, most=8))
            ]

            def torchs(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
                order, ends = ends_of(ids.flatten(), E)
                inverse = torch.empty_like(order).index_copy(0, order, torch.arange(T * K, device=run.device))
                return ends, order // K, inverse

            return {
                "glmx": [lambda x=x: ops.expert_plan(x, E) for x in inputs],
                "torch": [lambda x=x: torchs(x) for x in inputs],
            }

        shape = {"T": T, "E": E, "K": K}
        measure(run, "R2", "expert_plan", shape, make_plan, touched=touched, ceiling="copy", graph=True)


if __name__ == "__main__":
    main()
