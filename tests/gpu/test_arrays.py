"""Arrays of other libraries in the ops: NumPy's everywhere, CuPy's on a card: no copy, and CuPy's current stream."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch

from glmx import ops
from glmx.ops.arrays import is_array, with_arrays
from tests.gpu.device import ON_CUDA
from tests.ops.cases import cases, evaluate, same_bits

# One case of each op that has fp32 tensors alone.
PICKED = ["route_topk", "expert_plan", "moe_combine", "moe_mlp", "rms_norm", "add_rms_norm", "layer_norm", "rope"]
PICKED += ["silu_mul", "embedding", "linear", "grouped_gemm", "lm_head_logprob"]


class Recorded:
    """A function under with_arrays that keeps what it was called with: addresses, and torch's stream."""

    def __init__(self) -> None:
        self.given: list[int] = []
        self.made = self.stream = 0

    def call(self, x: torch.Tensor, y: torch.Tensor | None = None, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """The doubled x."""
        self.given = [tensor.data_ptr() for tensor in (x, y, out) if tensor is not None]
        assert all(isinstance(tensor, torch.Tensor) for tensor in (x, y, out) if tensor is not None)
        if x.is_cuda:
            self.stream = torch.cuda.current_stream().cuda_stream
        result = x * 2 if out is None else out.copy_(x * 2)
        self.made = result.data_ptr()
        return result


def address(array: Any) -> int:
    return array.ctypes.data if isinstance(array, numpy.ndarray) else array.data.ptr


def check_no_copy(xp: Any) -> None:
    recorded = Recorded()
    call = with_arrays(recorded.call)
    x, y = xp.arange(24, dtype=xp.float32).reshape(4, 6), xp.ones(3, xp.int32)
    got = call(x, y)
    assert type(got) is xp.ndarray and recorded.given == [address(x), address(y)] and recorded.made == address(got)
    assert bool((got == 2 * x).all())
    out = xp.zeros((4, 6), xp.float32)
    assert call(x, out=out) is out and recorded.given == [address(x), address(out)] and bool((out == 2 * x).all())
    wide = xp.arange(48, dtype=xp.float32).reshape(4, 12)
    assert bool((call(wide[:, ::2]) == 2 * wide[:, ::2]).all())  # strides are kept


def check_ops(xp: Any, name: str) -> None:
    """The bits of the same call with torch's tensors, NamedTuples and plain arguments included."""
    case = next(case for case in cases(name, wild=False) if "bf16" not in case.name and "no-rows" not in case.name)
    kwargs, want = case.make(), evaluate(ops, case, gradients=False)
    given = {key: xp.asarray(v.numpy()) if isinstance(v, torch.Tensor) else v for key, v in kwargs.items()}
    result = getattr(ops, name)(**given)
    arrays = result if isinstance(result, tuple) else (result,)
    assert all(type(array) is xp.ndarray for array in arrays)
    if hasattr(result, "_fields"):
        assert type(result).__name__ in ("ExpertPlan", "LogProbs")
    numbers = [numpy.asarray(array.get() if hasattr(array, "get") else array) for array in arrays]
    for (key, tensor), array in zip(want.items(), numbers, strict=True):
        assert same_bits(torch.from_numpy(array), tensor), key


def test_numpy_without_a_copy() -> None:
    check_no_copy(numpy)


@pytest.mark.parametrize("name", PICKED)
def test_numpy_in_every_op(name: str) -> None:
    check_ops(numpy, name)


def test_tensors_go_past_it() -> None:
    recorded = Recorded()
    call = with_arrays(recorded.call)
    x = torch.ones(3, requires_grad=True)
    assert call(x).requires_grad and recorded.given == [x.data_ptr()]
    assert not is_array(x) and not is_array([x]) and not is_array(1.5) and is_array(numpy.ones(2))
    assert call.__doc__ == "The doubled x."


def test_a_tensor_beside_an_array_gives_an_array() -> None:
    x = torch.ones(2, 8, requires_grad=True)
    got = ops.rms_norm(x, numpy.ones(8, numpy.float32), 1e-5)
    assert type(got) is numpy.ndarray and same_bits(torch.from_numpy(got), ops.rms_norm(x, torch.ones(8), 1e-5))


def test_errors_are_the_ops_own() -> None:
    with pytest.raises(ValueError, match="weight: expected shape"):
        ops.rms_norm(numpy.ones((2, 8), numpy.float32), numpy.ones(7, numpy.float32), 1e-5)

    class Strange:
        def __dlpack__(self) -> None: ...

    Strange.__module__ = "fractions"
    with pytest.raises(TypeError, match="one library|with from_dlpack: got .*Strange"):
        ops.rms_norm(numpy.ones((2, 8), numpy.float32), Strange(), 1e-5)


# --- CuPy


@pytest.fixture(scope="module")
def cupy() -> Any:
    if not ON_CUDA:
        pytest.skip("no CUDA card here")
    return pytest.importorskip("cupy")


def test_cupy_without_a_copy(cupy: Any) -> None:
    check_no_copy(cupy)


@pytest.mark.parametrize("name", PICKED)
def test_cupy_in_every_op(cupy: Any, name: str) -> None:
    check_ops(cupy, name)


def test_the_current_stream_of_cupy(cupy: Any) -> None:
    recorded = Recorded()
    call = with_arrays(recorded.call)
    x = cupy.arange(5, dtype=cupy.float32)
    call(x)
    assert recorded.stream == cupy.cuda.Stream.null.ptr == 0
    before = torch.cuda.current_stream()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        call(x)
        assert recorded.stream == stream.ptr != 0
    assert torch.cuda.current_stream() == before


def test_ops_are_in_order_with_the_kernels_of_cupy(cupy: Any) -> None:
    """A long kernel of CuPy's makes the input; nobody waits. Another stream would read it too early."""
    n = 4096
    weight = cupy.ones(n, cupy.float32)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        for seed in range(3):
            a = cupy.full((n, n), 1 / n, cupy.float32)
            for _ in range(8):
                a = a @ a
            x = a[:16] * 0 + seed + 1
            y = ops.rms_norm(x, weight, 0.0) * (seed + 2)
            stream.synchronize()
            assert bool((y == seed + 2).all())


def test_bf16_of_cupy(cupy: Any) -> None:
    try:
        import ml_dtypes

        x = cupy.ones((2, 8), ml_dtypes.bfloat16)
        torch.from_dlpack(x)
    except Exception as error:
        pytest.skip(f"this CuPy has no bf16 arrays: {type(error).__name__}")
    got = ops.rms_norm(x, x[0], 1e-5)
    assert got.dtype == x.dtype and bool((got == x).all())
