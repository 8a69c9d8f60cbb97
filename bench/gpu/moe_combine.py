"""R2: the weighted sum of expert rows, forward and backward; and the row-wise ops at the same widths.

Bytes: each row read once, each result written once. Peers: torch, op by op.
"""

from __future__ import annotations

from typing import Any

import torch
from timing import Calls, Options, chosen, measure, normal, options, sets

from glmx import ops

K = 8


def combined(rows: torch.Tensor, weights: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    T, H = inverse.shape[0], rows.shape[1]
    picked = rows[inverse.flatten().long()].view(T, -1, H)
    return (picked.float() * weights[..., None]).sum(1).to(rows.dtype)


def combine_rows(run: Options) -> None:
    shapes = [(H, T) for H in (6144, 5120, 4096) for T in (32, 1024, 16384)]
    for H, T in [(48, 9)] if run.small else chosen(shapes, run):
        touched = 2.0 * T * H * (K + 1) + 8.0 * T * K

        def inputs(T: int = T, H: int = H, touched: float = touched) -> list[tuple[torch.Tensor, ...]]:
            return [
                (
                    normal(T * K, H, run=run),
                    torch.rand(T, K, device=run.device),
                    torch.randperm(T * K, device=run.device).view(T, K).int(),
                )
                for _ in range(sets(touched, run, most=8))
            ]

        def make(inputs: Any = inputs) -> dict[str, Calls]:
            given = inputs()
            return {
                "glmx": [lambda g=g: ops.moe_combine(*g) for g in given],
                "torch": [lambda g=g: combined(*g) for g in given],
            }

        def make_backward(T: int = T, H: int = H, inputs: Any = inputs) -> dict[str, Calls]:
            out: dict[str, list] = {"glmx": [], "torch": []}
            for rows, weights, inverse in inputs():
                leaves, d_out = (rows.requires_grad_(), weights.requires_grad_()), normal(T, H, run=run)
                for name, call in (("glmx", ops.moe_combine), ("torch", combined)):
                    y = call(*leaves, inverse)
                    out[name].append(
                        lambda y=y, leaves=leaves, d_out=d_out: torch.autograd.grad(y, leaves, d_out, retain_graph=True)
                    )
            return out

        shape = {"T": T, "H": H, "K": K}
        measure(run, "R2", "moe_combine", shape, make, touched=touched, ceiling="copy", graph=T <= 1024)
        if T in (9, 16384):
            twice = 2.0 * T * H * (2 * K + 1) + 12.0 * T * K
            measure(
                run,
                "R2",
                "moe_combine backward",
                shape,
                make_backward,
                touched=twice,
                ceiling="copy",
                graph=False,
                grad=True,
            )


def row_ops(run: Options) -> None:
    shapes = [(H, T) for H in (4096, 6144) for T in (1, 8192)]
    for H, T in [(48, 9)] if run.small else chosen(shapes, run):
        weight = normal(H, run=run)

        def norm(x: torch.Tensor, weight: torch.Tensor = weight, H: int = H) -> torch.Tensor:
            return torch.nn.functional.rms_norm(x, (H,), weight, 1e-5)

        def make_norm(T: int = T, H: int = H, weight: torch.Tensor = weight, norm: Any = norm) -> dict[str, Calls]:
            given = [normal(T, H, run=run) for _ in range(sets(4.0 * T * H, run))]
            return {
                "glmx": [lambda x=x: ops.rms_norm(x, weight, 1e-5) for x in given],
                "torch": [lambda x=x: norm(x) for x in given],
            }

        def make_silu(T: int = T, H: int = H) -> dict[str, Calls]:
            given = [normal(T, 2 * H, run=run) for _ in range(sets(6.0 * T * H, run))]

            def torchs(x: torch.Tensor) -> torch.Tensor:
                gate, up = x.chunk(2, -1)
                return torch.nn.functional.silu(gate) * up

            return {
                "glmx": [lambda x=x: ops.silu_mul(x) for x in given],
                "torch": [lambda x=x: torchs(x) for x in given],
            }

        shape = {"T": T, "H": H}
        measure(run, "rows", "rms_norm", shape, make_norm, touched=4.0 * T * H, ceiling="copy", graph=True)
        measure(run, "rows", "silu_mul", shape, make_silu, touched=6.0 * T * H, ceiling="copy", graph=True)


def main() -> None:
    run = options(__doc__)
    combine_rows(run)
    row_ops(run)


if __name__ == "__main__":
    main()
