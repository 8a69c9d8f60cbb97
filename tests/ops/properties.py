"""X2 as a property: a row's outputs and gradients do not depend on which other rows are there, nor on their
order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.ops.cases import cotangent, named_tensors, same_bits


def _run(
    call: Callable[..., Any], rows: dict[str, torch.Tensor], grads: tuple[str, ...], dys: dict[str, torch.Tensor] | None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    leaves = {n: t.detach().clone().requires_grad_(n in grads) for n, t in rows.items()}
    outs = named_tensors(call(**leaves))
    live = {n: t for n, t in outs.items() if t.requires_grad}
    if dys is None:
        dys = {n: cotangent(n, t) for n, t in live.items()}
    if live:
        torch.autograd.backward(list(live.values()), [dys[n] for n in live])
    results = {n: t.detach() for n, t in outs.items()} | {f"d_{n}": leaves[n].grad for n in grads}
    return results, dys


def check_rows_stand_alone(
    call: Callable[..., Any], rows: dict[str, torch.Tensor], seed: int, grads: tuple[str, ...] = ()
) -> None:
    """`call` maps tensors with T rows to tensors with T rows; a shuffled part of the rows must give the same
    bits.
    """
    T = next(iter(rows.values())).shape[0]
    full, dys = _run(call, rows, grads, None)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(seed))
    for picked in (order[: max(1, T // 2)], order):
        part_dys = {n: t[picked] for n, t in dys.items()}
        part, _ = _run(call, {n: t[picked] for n, t in rows.items()}, grads, part_dys)
        for name, tensor in part.items():
            assert same_bits(tensor, full[name][picked]), (
                f"{name} of rows {picked.tolist()} differs from the full batch"
            )
