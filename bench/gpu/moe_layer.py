"""R4 and R5: the routed experts of a layer, forward and backward, all experts of released models, against torch.

The peer is torch's grouped_mm with its gather, SwiGLU and weighted sum op by op. A backward makes the gradients of x,
of the weights of the pairs and of both stacks of weights, in bf16.
"""

from __future__ import annotations

import torch
from timing import Calls, measure, options

from glmx import ops
from models import grouped, layers, routed, weights


def main() -> None:
    run = options(__doc__)
    counts = (9,) if run.small else (16384,) if run.quick else (16384, 32768)
    for kind in ("forward", "backward"):
        for name, layer in layers(run).items():
            for T in counts if kind == "forward" else counts[:1]:
                flop = 6.0 * T * layer.top_k * layer.hidden * layer.width

                def forward(layer=layer, T: int = T) -> dict[str, Calls]:
                    gate_up, down = weights(layer, run)
                    x, weights_TK, ids = routed(layer, T, run)
                    theirs = grouped(gate_up, down)
                    return {
                        "glmx": [lambda: ops.moe_mlp(x, weights_TK, ids, gate_up, down)],
                        "grouped_mm": [lambda: theirs(x, weights_TK, ids)],
                    }

                def backward(layer=layer, T: int = T) -> dict[str, Calls]:
                    gate_up, down = (w.requires_grad_() for w in weights(layer, run))
                    x, weights_TK, ids = routed(layer, T, run)
                    leaves = (x.requires_grad_(), weights_TK.requires_grad_(), gate_up, down)
                    d_out = torch.randn_like(x)
                    outs = {
                        "glmx": ops.moe_mlp(x, weights_TK, ids, gate_up, down),
                        "grouped_mm": grouped(gate_up, down)(x, weights_TK, ids),
                    }
                    return {
                        peer: [lambda y=y: torch.autograd.grad(y, leaves, d_out, retain_graph=True)]
                        for peer, y in outs.items()
                    }

                shape = {"name": name, "T": T, "E": layer.experts, "H": layer.hidden, "I": layer.width}
                measure(
                    run,
                    "R4" if kind == "forward" else "R5",
                    f"MoE layer {kind}",
                    shape,
                    forward if kind == "forward" else backward,
                    flop=flop * (1 if kind == "forward" else 2),
                    ceiling="matmul",
                    graph=False,
                    grad=kind == "backward",
                    bound=2**-5,
                )


if __name__ == "__main__":
    main()
