"""The tests of tests/ops on the device: values and gradients against fp64, X2 as a property, NaN, ties, main_grad.

Their bounds are those of the CPU's order of additions. A tensor core's sums of bf16 products stay well inside: it loses
at most 9 units of 2^-24 of sum |x||w| at K = 6144 (docs/gpu_facts.jsonl), where the bound allows 209.
Left out, each for its reason: see left_out.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.gpu.device import STEMS, need_device
from tests.gpu.moved import moved_ops
from tests.ops.inputs import Case

DEVICE = need_device()
MODULES = (*STEMS, "grouped_gemm_properties")

# What is told apart by its name. A card does not check the contents of index tensors, so a test of such an error would
# end the process (test_refusals.py has the others); threads and the CPU's memory are not the card's.
LEFT_OUT = (
    "refused",
    "checks_its_workspaces",
    "no_buffer_of_tokens_by_vocabulary",
    "one_op_is_called_where_no_gradient",
)
# The emulated order of additions is not that of a tensor core's bf16 products.
EMULATED = ("has_the_bits_of_the_tree", "total_order_of_the_emulated_logits")


def left_out(name: str, function: Callable[..., Any]) -> bool:
    return any(part in name for part in LEFT_OUT) or "restore_threads" in inspect.signature(function).parameters


def for_the_device(name: str, case: Case) -> bool:
    """conftest.py drops the other cases as they are collected."""
    if case.name.startswith("stored-"):  # weights in few bits have no GPU kernel
        return False
    return not (any(part in name for part in EMULATED) and case.name.startswith("bf16"))


for stem in MODULES:
    module = importlib.import_module(f"tests.ops.test_{stem}")
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if name.startswith("test_") and function.__module__ == module.__name__ and not left_out(name, function):
            globals()[f"test_{stem}_{name.removeprefix('test_')}"] = function


@pytest.fixture(autouse=True)
def on_the_device() -> Iterator[None]:
    with moved_ops(DEVICE):
        yield


@pytest.mark.parametrize("stem", MODULES)
def test_every_op_brings_its_tests(stem: str) -> None:
    assert sum(name.startswith(f"test_{stem}_") for name in globals()) >= 2
    assert for_the_device("test_forward_has_the_bits_of_the_tree", Case("linear", "fp32-1x1", dict))
    assert not for_the_device("test_forward_has_the_bits_of_the_tree", Case("linear", "bf16-1x1", dict))
    assert for_the_device("test_forward_against_the_oracle", Case("linear", "bf16-1x1", dict))
