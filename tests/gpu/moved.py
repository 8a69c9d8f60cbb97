"""glmx.ops for tensors of the CPU, computed on another device: arguments and gradients cross over, results come back.

With these in the place of glmx.ops the tests of tests/ops, which make their tensors on the CPU, judge a GPU's kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from glmx import ops
from tests.gpu.device import STEMS
from tests.ops import cases

NAMES = tuple(name for stem in STEMS for name in cases.STEMS[stem])


class _Cross(torch.autograd.Function):
    """A copy on the device. A parameter's main_grad crosses with it, and back once the backward has written it."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, device: torch.device, crossed: list) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.main_grad, ctx.crossed = getattr(tensor, "main_grad", None), crossed
        return tensor.detach().to(device, copy=True)

    @staticmethod
    def backward(ctx, grad: torch.Tensor | None):
        if ctx.main_grad is not None:
            ctx.main_grad.copy_(ctx.crossed[0])
        return None if grad is None else grad.cpu(), None, None


def _cross(value: Any, device: torch.device) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if not value.requires_grad:
        return value.to(device, copy=True)
    main_grad = getattr(value, "main_grad", None)
    crossed = [] if main_grad is None else [main_grad.to(device, copy=True)]
    there = _Cross.apply(value, device, crossed)
    if crossed:
        there.main_grad = crossed[0]
    return there


def on(device: torch.device, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, called with copies of its tensors on `device`; `out` is written as if it had been passed itself."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        there = [_cross(arg, device) for arg in args]
        named = {name: _cross(arg, device) for name, arg in kwargs.items()}
        result = function(*there, **named)
        out = kwargs.get("out")
        if out is not None and result is named["out"]:
            return out.copy_(result)
        if isinstance(result, torch.Tensor):
            return result.cpu()
        back = [tensor.cpu() for tensor in result]
        return type(result)(*back) if hasattr(result, "_fields") else tuple(back)

    return call


@contextmanager
def moved_ops(device: torch.device) -> Iterator[None]:
    """glmx.ops' ported functions run on `device` inside."""
    kept = {name: getattr(ops, name) for name in NAMES}
    try:
        for name, function in kept.items():
            setattr(ops, name, on(device, function))
        yield
    finally:
        for name, function in kept.items():
            setattr(ops, name, function)
