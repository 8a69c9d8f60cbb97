"""R7: the routed experts of a layer for few tokens, in a CUDA graph, against the bytes of the experts that are hit.

Peers: the layer in torch's grouped_mm, in a graph too; and, for a few tokens, a loop of products over the experts hit,
which the capture knows by heart: no router could use it. Each input set is routed to other experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import Calls, measure, options
from torch.nn import functional as F

from glmx import ops
from models import grouped, layers, routed, weights

SETS = 6


def loop(gate_up: torch.Tensor, down: torch.Tensor, ids: torch.Tensor) -> Callable[..., torch.Tensor]:
    pairs = [(t, k, e) for t, row in enumerate(ids.tolist()) for k, e in enumerate(row)]
    hit: dict[int, list[tuple[int, int]]] = {}
    for t, k, e in pairs:
        hit.setdefault(e, []).append((t, k))
    at = {e: [torch.tensor(part, device=ids.device) for part in zip(*where, strict=True)] for e, where in hit.items()}

    def call(x: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(x.shape, device=x.device)
        for e, (tokens, k) in at.items():
            gate, up = F.linear(x[tokens], gate_up[e]).chunk(2, -1)
            rows = F.linear(F.silu(gate) * up, down[e])
            out.index_put_((tokens,), rows.float() * weights_TK[tokens, k, None], accumulate=True)
        return out.to(x.dtype)

    return call


def main() -> None:
    run = options(__doc__)
    for name, layer in layers(run).items():
        try:
            gate_up, down = weights(layer, run)
        except torch.OutOfMemoryError:
            gate_up = down = None  # measure() says so
        for T in (1, 4) if run.small else (1, 16) if run.quick else (1, 4, 16, 64):
            given = [routed(layer, T, run) for _ in range(SETS)]
            hit = sum(len(ids.unique()) for _, _, ids in given) / SETS
            touched = hit * 6.0 * layer.hidden * layer.width + 4.0 * T * layer.hidden

            def make(T: int = T, given=given, gate_up=gate_up, down=down) -> dict[str, Calls]:
                if gate_up is None:
                    raise torch.OutOfMemoryError("the weights")
                theirs = grouped(gate_up, down)
                calls: dict[str, Calls] = {
                    "glmx": [lambda g=g: ops.moe_mlp(*g, gate_up, down) for g in given],
                    "grouped_mm": [lambda g=g: theirs(*g) for g in given],
                }
                if T <= 4:
                    calls["loop"] = [lambda g=g, c=loop(gate_up, down, g[2]): c(*g[:2]) for g in given]
                return calls

            shape = {"name": name, "T": T, "E": layer.experts, "H": layer.hidden, "I": layer.width}
            measure(
                run,
                "R7",
                "moe_mlp",
                shape,
                make,
                flop=6.0 * T * layer.top_k * layer.hidden * layer.width,
                touched=touched,
                ceiling="read",
                graph=True,
                note=f"{hit:.0f} experts hit",
            )
        del gate_up, down


if __name__ == "__main__":
    main()
