"""A device "cuda:0" that this CPU plays: tensors that say they are there, and fail where they meet others.

`played()` is a context in which torch makes such tensors and glmx finds a card. Each holds a tensor of the CPU, which
torch's and glmx's kernels of the CPU compute with, so a model there must give the CPU's bits. As on a GPU, an op of
tensors on two devices fails; here one that torch would let pass, and copy in silence, fails too. What is copied between
the devices is counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from glmx import runtime

CUDA = torch.device("cuda", 0)
# Copies between devices; `lift_fresh` is what torch.tensor makes before it sends its numbers over.
_BETWEEN = {"_to_copy", "copy_", "lift_fresh"}


class Played(torch.Tensor):
    """`inner` is its CPU tensor. C++ sees a tensor on "meta", which autograd walks through on the calling thread."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Played:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",
        )
        self.inner = inner
        return self

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    @property
    def data(self) -> Played:
        return Played(self.inner.detach())

    @data.setter
    def data(self, new: Played) -> None:
        assert isinstance(new, Played) and new.shape == self.shape and new.dtype == self.dtype
        self.inner = new.inner

    def tolist(self) -> Any:
        _playing().count(self.inner)
        return self.inner.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"Played({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of played()")


@dataclass
class Copies:
    """Between the devices, either way: how many, and bytes in all."""

    number: int = 0
    nbytes: int = 0


class Playing(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        # As what FakeTensors are made by: torch then makes no CUDA context when it is asked for a tensor there.
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE
        self.copies = Copies()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # true would import torch._dynamo, which takes half a second

    def count(self, tensor: torch.Tensor) -> None:
        self.copies.number += 1
        self.copies.nbytes += tensor.nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        there = [x for x in tensors if isinstance(x, Played)]
        namespace, name = func._schema.name.split("::")
        # torch takes a number on the CPU, a tensor without dimensions, beside any tensor.
        here = [x for x in tensors if not isinstance(x, Played) and (x.dim() or namespace == "glmx")]
        if there and here and name not in _BETWEEN:
            shapes = [(tuple(x.shape), str(x.device)) for x in tensors]
            raise RuntimeError(f"{func}: expected all tensors on one device: got {shapes}")
        device = kwargs.get("device")
        to_cuda = bool(there) if device is None else torch.device(device).type == "cuda"
        if device is not None:
            kwargs["device"] = torch.device("cpu") if to_cuda else device
        if name == "_local_scalar_dense" and there:
            self.count(there[0].inner)
        if name == "copy_" and there and here:
            self.count(there[0].inner)
        made = {id(x.inner): x for x in there}
        out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if name == "_to_copy" and to_cuda != bool(there):
            self.count(out)
        if name == "copy_":
            return args[0]

        def outer(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or not to_cuda:
                return x
            return made[id(x)] if id(x) in made else Played(x)

        return tree_map(outer, out)


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, Played) else x


def _playing() -> Playing:
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    assert isinstance(mode, Playing), "outside of played()"
    return mode


@contextlib.contextmanager
def a_card(count: int = 1, capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """glmx finds cards, and a build that has kernels for them."""
    native = runtime.native()
    build = {**native.build_info(), "cuda": "13.0"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "build_info", lambda: build)
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(torch.cuda, "device_count", lambda: count)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "get_device_name", lambda device: "Played GPU")
        patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        yield


@contextlib.contextmanager
def played() -> Iterator[Copies]:
    """-> what is copied between the devices meanwhile."""
    mode = Playing()
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes its numbers here, then sends them
    try:
        with a_card(), mode:
            yield mode.copies
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
