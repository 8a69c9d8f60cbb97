"""Recorder: turns a function of tensors into one native call (the CPU's analogue of a CUDA graph).

While `record` runs the function once, every glmx op that it calls is kept with its arguments' addresses; what torch
itself may do inside the model (tests/models/test_torch_allowlist.py) is kept too: copies, gathers, sums and products
become loops of csrc/core/elementwise.h. Views cost nothing. Anything else is refused. A replay makes the same calls on
the same addresses, so its bits are the same.

Memory: what the function allocates comes from a `Pool` that recordings share. A block is free again when the last
tensor in it is gone, so later layers, and other recordings, use it once more. A recording keeps the blocks that its
calls write to; a result is good until any recording of its pool is replayed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glmx import runtime

ALIGN = 64
_DIMS = 4  # kCopyDims

Result = Any  # a tensor, or tuples of tensors and None


class Pool:
    """Blocks of memory, used again as soon as no tensor lies in them. They live as long as somebody keeps them."""

    def __init__(self) -> None:
        self._blocks: list[weakref.ref[torch.Tensor]] = []

    @property
    def blocks(self) -> list[torch.Tensor]:
        found = [block() for block in self._blocks]
        return [block for block in found if block is not None]

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    def take(self, size: int) -> torch.Tensor:
        """The smallest free block of at least `size` bytes, or a new one."""
        fits = [block for block in self.blocks if block.nbytes >= size and is_free(block)]
        if fits:
            return min(fits, key=lambda block: block.nbytes)
        new = torch.empty(max(-(-size // ALIGN), 1) * ALIGN, dtype=torch.uint8)
        self._blocks = [weakref.ref(block) for block in [*self.blocks, new]]
        return new


def is_free(block: torch.Tensor) -> bool:
    """Whether no tensor but the block itself has its storage; the storage's own Python object counts too."""
    return torch._C._storage_Use_Count(block.untyped_storage()._cdata) <= 2


class Recorded:
    """`replay()` computes `result` again, out of what the inputs hold by then; `size` is its number of calls.

    False, and nothing is done, when a tensor that it watches has moved.
    """

    def __init__(self, calls: Any, result: Result, blocks: Sequence[torch.Tensor]) -> None:
        self.replay: Callable[[], bool] = calls.replay
        self.size, self.result, self._blocks = len(calls), result, blocks


class RefusedError(RuntimeError):
    """A function that cannot be recorded; `result` is what it has computed all the same."""

    def __init__(self, reason: str, result: Result) -> None:
        super().__init__(reason)
        self.result = result


def record(compute: Callable[[], Result], pool: Pool, watched: Sequence[torch.Tensor] = ()) -> Recorded:
    """Runs `compute` and keeps what it did; RefusedError when that cannot be done again.

    `watched` are tensors that others may give new memory: the model's weights.
    """
    native = runtime.native()
    calls = native.Recording()
    mode = _Recorder(pool)
    calls.begin()
    try:
        if watched:
            torch.ops.glmx.watch(watched)
        with torch.no_grad(), mode:
            result = compute()
    finally:
        calls.end()
    if mode.refused is None and len(calls) != mode.expected:
        mode.refused = f"{mode.expected} ops were called, {len(calls)} of them can be recorded"
    if mode.refused is not None:
        raise RefusedError(mode.refused, result)
    return Recorded(calls, result, list(mode.blocks.values()))


class _Recorder(TorchDispatchMode):
    """Sees every torch op of a forward; glmx's own record themselves, `expected` counts them all."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool, self.expected = pool, 0
        self.blocks: dict[int, torch.Tensor] = {}  # by their addresses
        self.refused: str | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # true would import torch._dynamo, which takes half a second, at the first recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        namespace, name = func._schema.name.split("::")
        if namespace == "glmx":
            self.expected += 1
        elif name in _ALLOCATIONS:
            out = self._empty_like(out)
        elif name in _LOOPS:
            twin = self._empty_like(out)
            loops = _LOOPS[name](twin, *args) if name == "clone" or not kwargs else 0
            self.expected += loops
            if not loops:
                self._refuse(f"aten::{name} of these tensors is none of the recorder's loops")
            out = twin if loops else out
        elif not (func.is_view or name == "_unsafe_view") or name == "lift_fresh":
            self._refuse(f"aten::{name} is neither a view nor one of the recorder's loops")
        return out

    def _empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        block = self.pool.take(tensor.nbytes)
        self.blocks[block.data_ptr()] = block
        return block[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    def _refuse(self, reason: str) -> None:
        self.refused = self.refused or reason


# What makes a tensor of numbers that Python holds is none of them: a replay would see those of its first time.
_ALLOCATIONS = {"empty", "empty_like", "new_empty"}


def _copy(to: torch.Tensor, source: torch.Tensor) -> int:
    if to.dtype != source.dtype or to.dim() > _DIMS:
        return 0
    lead = _DIMS - to.dim()
    sizes, ones = [1] * lead + list(to.shape), [0] * lead
    strides = ones + list(to.stride()), ones + list(source.stride())
    if not to.dim():
        strides = [0, 0, 0, 1], [0, 0, 0, 1]
    runtime.native().copy(to.data_ptr(), source.data_ptr(), sizes, *strides, to.itemsize)
    return 1


def _cat(out: torch.Tensor, tensors: Sequence[torch.Tensor], dim: int = 0) -> int:
    loops, start = 0, 0
    for tensor in tensors:
        if tensor.dim() != out.dim():
            return 0
        loops += _copy(out.narrow(dim, start, tensor.shape[dim]), tensor)
        start += tensor.shape[dim]
    return loops if loops == len(tensors) else 0


def _index(out: torch.Tensor, source: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> int:
    rows = indices[0]
    simple = len(indices) == 1 and rows is not None and rows.dtype == torch.int64 and rows.dim() == 1
    if not simple or rows is None or not (source.is_contiguous() and rows.is_contiguous()):
        return 0
    row_bytes = source[0].nbytes
    runtime.native().gather(out.data_ptr(), source.data_ptr(), rows.data_ptr(), len(rows), source.shape[0], row_bytes)
    return 1


def _add(out: torch.Tensor, a: torch.Tensor, b: Any) -> int:
    if not isinstance(b, torch.Tensor) or not (_dense(a, out) and _dense(b, out)):
        return 0
    runtime.native().add(out.data_ptr(), a.data_ptr(), b.data_ptr(), out.numel(), out.dtype is torch.bfloat16)
    return 1


def _mul(out: torch.Tensor, x: torch.Tensor, factor: Any) -> int:
    if not isinstance(factor, float) or not _dense(x, out) or x.dtype is not torch.float32:
        return 0
    runtime.native().scale(out.data_ptr(), x.data_ptr(), out.numel(), factor)
    return 1


def _dense(x: torch.Tensor, like: torch.Tensor) -> bool:
    model_dtype = x.dtype in (torch.float32, torch.bfloat16)
    return model_dtype and x.dtype == like.dtype and x.shape == like.shape and x.is_contiguous()


# The loops that stand for a torch op: each writes its result and says how many it has recorded, 0 for none.
_LOOPS: dict[str, Callable[..., int]] = {"cat": _cat, "clone": _copy, "index": _index, "add": _add, "mul": _mul}
