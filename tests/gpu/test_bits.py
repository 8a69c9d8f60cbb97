"""The device's bits: those of the CPU's kernels, but for products of bf16; and the same ones on every run (X1)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glmx import ops
from tests.gpu.device import ON_CUDA, need_device
from tests.gpu.moved import NAMES, on
from tests.ops.cases import Case, dense_cases, evaluate, same_bits
from tests.ops.test_promises import assert_same_bits

DEVICE = need_device()
MOVED: Any = SimpleNamespace(**{name: on(DEVICE, getattr(ops, name)) for name in NAMES})
CASES = [case for name in NAMES for case in dense_cases(name)]

# Products of bf16 are the tensor core's: sums in another order than the CPU's.
MULTIPLY = ("grouped_gemm", "grouped_gemm_dgrad", "grouped_gemm_wgrad", "linear", "moe_mlp", "lm_head_logprob")


def for_the_device(name: str, case: Case) -> bool:
    """Where the device is the CPU itself there is nothing to compare it with: conftest.py drops those cases."""
    return ON_CUDA or name != "test_the_bits_of_the_cpu"


def has_products_of_bf16(case: Case) -> bool:
    return case.op in MULTIPLY and any(
        isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 for value in case.make().values()
    )


@pytest.mark.parametrize("case", [case for case in CASES if not has_products_of_bf16(case)], ids=str)
def test_the_bits_of_the_cpu(case: Case) -> None:
    assert_same_bits(evaluate(MOVED, case), evaluate(ops, case), f"{case} on {DEVICE} and on the CPU")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_x1_the_same_bits_on_every_run(case: Case) -> None:
    """The second and third run find other memory, and another stream."""
    first = evaluate(MOVED, case)
    taken = [torch.ones(1 << n, device=DEVICE) for n in range(4, 18)]  # so that the next tensors lie elsewhere
    assert_same_bits(evaluate(MOVED, case), first, "second run")
    if ON_CUDA:
        with torch.cuda.stream(torch.cuda.Stream()):
            assert_same_bits(evaluate(MOVED, case), first, "on another stream")
    del taken


def test_the_comparison_sees_one_bit() -> None:
    case = next(case for case in CASES if case.op == "rms_norm" and case.name == "fp32-5x17")
    want = evaluate(ops, case)
    got = {name: tensor.clone() for name, tensor in want.items()}
    got["d_x"].view(torch.int32)[2, 3] ^= 1
    assert same_bits(got["out"], want["out"])
    with pytest.raises(AssertionError, match=r"d_x differs in 1 of 85 elements, first at \(2, 3\)"):
        assert_same_bits(got, want, "")
