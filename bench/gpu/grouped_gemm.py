"""R3: grouped products in bf16, against torch's grouped_mm and a loop of matmuls over the experts.

The shapes are those of docs/gpu_facts.jsonl: experts of released models with equal rows each. The loop knows each
expert's rows on the host, which a layer does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timing import Calls, Options, chosen, measure, normal, options
from torch.nn import functional as F

from glmx import ops

# name, experts, N, K, rows of an expert
SHAPES = [
    ("air_up", 128, 2816, 4096, 1024),
    ("air_down", 128, 4096, 1408, 1024),
    ("glm5_up_ep8", 32, 4096, 6144, 2048),
    ("glm5_down_ep8", 32, 6144, 2048, 2048),
    ("glm45_up_ep4", 40, 3072, 5120, 256),
]
TOP_K = 8


def kinds(run: Options, E: int, N: int, K: int, rows: int) -> dict[str, Callable[[], dict[str, Calls]]]:
    """Each kind of call, as measure() wants it."""
    R = E * rows
    offsets = torch.arange(E + 1, device=run.device, dtype=torch.int32) * rows
    ends = offsets[1:]
    spans = [slice(e * rows, (e + 1) * rows) for e in range(E)]

    def forward() -> dict[str, Calls]:
        x, w, out = normal(R, K, run=run), normal(E, N, K, run=run, scale=K**-0.5), normal(R, N, run=run)

        def loop() -> torch.Tensor:
            for e, span in enumerate(spans):
                torch.mm(x[span], w[e].t(), out=out[span])
            return out

        return {
            "glmx": [lambda: ops.grouped_gemm(x, w, offsets)],
            "grouped_mm": [lambda: F.grouped_mm(x, w.transpose(1, 2), offs=ends)],
            "loop": [loop],
        }

    def gather_silu() -> dict[str, Calls]:
        """A layer's up projection: rows picked from tokens, SwiGLU at the end."""
        T = R // TOP_K
        x, w = normal(T, K, run=run), normal(E, N, K, run=run, scale=K**-0.5)
        row_token = torch.randperm(R, device=run.device).int() // TOP_K

        def torchs() -> torch.Tensor:
            gate, up = F.grouped_mm(x[row_token.long()], w.transpose(1, 2), offs=ends).chunk(2, -1)
            return F.silu(gate) * up

        return {
            "glmx": [lambda: ops.grouped_gemm(x, w, offsets, row_token=row_token, silu_mul=True)],
            "grouped_mm": [torchs],
        }

    def dgrad() -> dict[str, Calls]:
        dy, w, out = normal(R, N, run=run), normal(E, N, K, run=run, scale=N**-0.5), normal(R, K, run=run)

        def loop() -> torch.Tensor:
            for e, span in enumerate(spans):
                torch.mm(dy[span], w[e], out=out[span])
            return out

        return {
            "glmx": [lambda: ops.grouped_gemm_dgrad(dy, w, offsets)],
            "grouped_mm": [lambda: F.grouped_mm(dy, w, offs=ends)],
            "loop": [loop],
        }

    def wgrad() -> dict[str, Calls]:
        dy, x, out = normal(R, N, run=run, scale=rows**-0.5), normal(R, K, run=run), normal(E, N, K, run=run)

        def loop() -> torch.Tensor:
            for e, span in enumerate(spans):
                torch.mm(dy[span].t(), x[span], out=out[e])
            return out

        return {
            "glmx": [lambda: ops.grouped_gemm_wgrad(dy, x, offsets)],
            "grouped_mm": [lambda: F.grouped_mm(dy.t(), x, offs=ends)],
            "loop": [loop],
        }

    return {"forward": forward, "forward, gather + silu_mul": gather_silu, "dgrad": dgrad, "wgrad": wgrad}


def main() -> None:
    run = options(__doc__)
    shapes: list[Any] = [("tiny_up", 4, 32, 48, 8)] if run.small else chosen(SHAPES, run)
    for kind in ("forward", "forward, gather + silu_mul", "dgrad", "wgrad"):
        for name, E, N, K, rows in shapes:
            if kind.endswith("silu_mul") and "up" not in name:
                continue
            shape = {"name": name, "E": E, "N": N, "K": K, "rows": rows}
            make = kinds(run, E, N, K, rows)[kind]
            flop = 2.0 * E * rows * N * K
            measure(run, "R3", f"grouped_gemm {kind}", shape, make, flop=flop, ceiling="matmul", graph=False)


if __name__ == "__main__":
    main()
