"""Arrays of other libraries in the ops: CuPy's, NumPy's, what else speaks DLPack. No copy; on CuPy's current stream.

`glmx.ops` wraps each of its functions in `with_arrays`, once. A call whose arguments are torch's runs as before.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from glmx.ops.stored_weight import StoredWeight

# What a call without arrays is made of: looked up first, so that it costs a fraction of a microsecond.
_PLAIN = frozenset({Tensor, torch.nn.Parameter, StoredWeight, int, float, bool, str, type(None), torch.dtype})


def is_array(value: Any) -> bool:
    """Whether it is an array that shares its memory by DLPack, and no tensor of torch."""
    return hasattr(type(value), "__dlpack__") and not isinstance(value, Tensor)


def with_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which then also takes arrays wherever it takes tensors.

    Given one or more arrays of a library, it returns that library's arrays, whose memory is that of the op's results;
    an array passed to be written (`out`) is written and returned itself. It works on the library's current stream:
    CuPy's `cupy.cuda.get_current_stream()`. Nothing is differentiable then. Arrays of two libraries are a TypeError.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for value in args:
            if type(value) not in _PLAIN and is_array(value):
                return _call(function, args, kwargs)
        for value in kwargs.values():
            if type(value) not in _PLAIN and is_array(value):
                return _call(function, args, kwargs)
        return function(*args, **kwargs)

    return call


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    arrays = [value for value in (*args, *kwargs.values()) if is_array(value)]
    library = _library(arrays[0])
    for other in map(_library, arrays):
        if other is not library:
            raise TypeError(
                f"{function.__name__}: expected arrays of one library: got {library.__name__}'s and {other.__name__}'s"
            )
    owners: dict[int, Any] = {}

    def tensor(value: Any) -> Any:
        if not is_array(value):
            return value
        out = torch.from_dlpack(value)
        owners[id(out)] = value
        return out

    def array(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return owners[id(value)] if id(value) in owners else library.from_dlpack(value)

    with _stream(library, arrays[0]), torch.no_grad():
        tensors = [tensor(value) for value in args]
        named = {name: tensor(value) for name, value in kwargs.items()}
        result = function(*tensors, **named)
        if not isinstance(result, tuple):
            return array(result)
        parts = [array(part) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)


def _library(array: Any) -> ModuleType:
    """The package of the array's type, with `from_dlpack`."""
    library = importlib.import_module(type(array).__module__.partition(".")[0])
    if not hasattr(library, "from_dlpack"):
        raise TypeError(f"expected an array of a library with from_dlpack: got {type(array).__qualname__}")
    return library


def _stream(library: ModuleType, array: Any) -> AbstractContextManager[Any]:
    """torch works on the stream that the library works on: then DLPack has nothing to wait for, before or after."""
    if library.__name__ != "cupy":
        return nullcontext()
    index = array.device.id
    stream = library.cuda.get_current_stream(index)
    if stream.ptr == 0:  # the default stream, which torch names for itself
        return torch.cuda.stream(torch.cuda.default_stream(index))
    return torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr, device=index))
