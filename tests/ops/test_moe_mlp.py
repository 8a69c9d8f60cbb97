"""moe_mlp: the bits and gradients of the ops that it is made of, values against the fp64 oracle; X2; errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from glmx import ops, reference
from tests.ops.cases import (
    BF16,
    DTYPES,
    NAN,
    Case,
    cases,
    cotangent,
    dense_cases,
    expert_operands,
    same_bits,
    values,
    with_grad,
)
from tests.ops.checks import F64, TINY, U32, UNIT, assert_within, gemm_bound, gemm_unit, rounding
from tests.ops.properties import check_rows_stand_alone
from tests.ops.test_grouped_gemm import silu_exact

WEIGHTS = ("gate_up_proj", "down_proj")
LEAVES = ("x", "topk_weights", *WEIGHTS)


def composed(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
) -> torch.Tensor:
    plan = ops.expert_plan(topk_ids, gate_up_proj.shape[0])
    h = ops.grouped_gemm(
        x, gate_up_proj, plan.expert_offsets, row_token=plan.row_token, inverse=plan.inverse, silu_mul=True
    )
    return ops.moe_combine(ops.grouped_gemm(h, down_proj, plan.expert_offsets), topk_weights, plan.inverse)


@pytest.mark.parametrize("case", cases("moe_mlp"), ids=str)
def test_one_call_has_the_bits_of_its_ops(case: Case) -> None:
    kwargs = case.make()
    got = ops.moe_mlp(**kwargs)
    assert got.dtype == kwargs["x"].dtype and same_bits(got, composed(**kwargs))


@pytest.mark.parametrize("case", [c for c in dense_cases("moe_mlp") if c.grads], ids=str)
def test_gradients_are_those_of_its_ops(case: Case) -> None:
    def run(call: Callable[..., torch.Tensor], wanted: tuple[str, ...]) -> list[torch.Tensor | None]:
        kwargs = with_grad(case.make(), wanted)
        out = call(**kwargs)
        out.backward(cotangent("out", out))
        return [out.detach(), *(kwargs[name].grad for name in LEAVES)]

    for wanted in (LEAVES, *((name,) for name in LEAVES)):
        for got, want in zip(run(ops.moe_mlp, wanted), run(composed, wanted), strict=True):
            assert (got is None and want is None) or same_bits(got, want)


def exact_and_bound(kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact result, pair by pair, and the error of two products, two roundings of rows and a weighted sum."""
    x, ids, u = kwargs["x"].to(F64), kwargs["topk_ids"], UNIT[kwargs["x"].dtype]
    out, bound, sizes = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
    for (t, k), e in zip(torch.cartesian_prod(*map(torch.arange, ids.shape)).tolist(), ids.flatten(), strict=True):
        if e < 0:
            continue
        row, gate_up, down = x[t : t + 1], *(kwargs[name][e].to(F64) for name in WEIGHTS)
        h, e_h = silu_exact(row @ gate_up.T, gemm_bound(row, gate_up))
        e_h = e_h * (1 + u) + rounding(h, kwargs["x"].dtype)
        y, I = h @ down.T, h.shape[1]
        e_y = (e_h + gemm_unit(I) * (h.abs() + e_h)) @ down.abs().T + (I + 2) * TINY
        e_y = e_y * (1 + u) + rounding(y, kwargs["x"].dtype)
        weight = kwargs["topk_weights"][t, k].to(F64)
        out[t] += weight * y[0]
        bound[t] += weight.abs() * e_y[0]
        sizes[t] += weight.abs() * (y + e_y)[0].abs()
    bound += ids.shape[1] * (U32 * sizes + TINY)
    return out, bound * (1 + u) + rounding(out, kwargs["x"].dtype)


@pytest.mark.parametrize("case", dense_cases("moe_mlp", wild=False), ids=str)
def test_against_the_oracle(case: Case) -> None:
    kwargs = case.make()
    exact, bound = exact_and_bound(kwargs)
    torch.testing.assert_close(reference.moe_mlp(**kwargs, exact=True), exact)
    assert_within(ops.moe_mlp(**kwargs), exact, bound)
    assert_within(reference.moe_mlp(**kwargs), exact, bound)


class Seen(TorchDispatchMode):
    """The names of the glmx ops that were called, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "glmx":
            self.names.append(func._schema.name.removeprefix("glmx::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", LEAVES)
def test_one_op_is_called_where_no_gradient_can_be_asked_for(name: str) -> None:
    kwargs = expert_operands(5, 2, 4, 20, 12, torch.float32)
    several = ["expert_plan", "grouped_gemm", "grouped_gemm", "moe_combine"]
    for grads, enabled, want in (((), True, ["moe_mlp"]), ((name,), False, ["moe_mlp"]), ((name,), True, several)):
        with Seen() as seen, torch.set_grad_enabled(enabled):
            ops.moe_mlp(**with_grad(kwargs, grads))
        assert seen.names == want


@pytest.mark.parametrize("dtype", DTYPES)
def test_main_grad_of_the_experts(dtype: torch.dtype) -> None:
    kwargs = with_grad(expert_operands(9, 2, 4, 20, 12, dtype), LEAVES)
    ops.moe_mlp(**kwargs).backward(values(9, 20, dtype=dtype))
    again = with_grad(kwargs, LEAVES)
    for name in WEIGHTS:
        again[name].main_grad = torch.zeros(again[name].shape)
    ops.moe_mlp(**again).backward(values(9, 20, dtype=dtype))
    assert same_bits(again["x"].grad, kwargs["x"].grad)
    for name in WEIGHTS:
        assert again[name].grad is None and same_bits(again[name].main_grad.to(dtype), kwargs[name].grad)


@given(
    st.integers(1, 24),
    st.integers(1, 3),
    st.integers(1, 60),
    st.integers(1, 40),
    st.integers(0, 999),
    st.sampled_from(DTYPES),
    st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_x2_a_token_does_not_see_the_others(
    T: int, K: int, H: int, I: int, seed: int, dtype: torch.dtype, gradients: bool
) -> None:
    kwargs = expert_operands(T, K, 5, H, I, dtype, holes=True)
    experts = {name: kwargs.pop(name) for name in WEIGHTS}
    grads = ("x", "topk_weights") if gradients else ()
    check_rows_stand_alone(lambda **rows: ops.moe_mlp(**rows, **experts), kwargs, seed, grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_token_and_in_its_expert(dtype: torch.dtype) -> None:
    kwargs = expert_operands(6, 2, 4, 20, 12, dtype)
    kwargs["topk_ids"] = torch.tensor([[0, 1], [1, 2], [-1, 0], [2, 0], [0, 2], [-1, -1]], dtype=torch.int32)
    clean = ops.moe_mlp(**kwargs)
    kwargs["x"][1] = NAN
    kwargs["x"][5] = NAN  # goes to no expert
    kwargs["topk_weights"][2, 0] = NAN  # the weight of a pair that is skipped
    kwargs["down_proj"][3] = NAN  # an expert that no token goes to
    got = ops.moe_mlp(**kwargs)
    assert got[1].isnan().all() and same_bits(got[[0, 2, 3, 4, 5]], clean[[0, 2, 3, 4, 5]])
    assert same_bits(got[5], torch.zeros(20, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_arguments_are_taken(dtype: torch.dtype) -> None:
    kwargs = expert_operands(5, 2, 4, 20, 12, dtype)
    strided = {name: torch.stack((tensor, tensor), -1)[..., 0] for name, tensor in kwargs.items()}
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    assert same_bits(ops.moe_mlp(**strided), ops.moe_mlp(**kwargs))


BAD: list[tuple[dict[str, torch.Tensor], str]] = [
    ({"x": torch.zeros(3, 8, dtype=F64)}, "x"),
    ({"x": torch.zeros(24)}, "x"),
    ({"x": torch.zeros(3, 9)}, "down_proj"),
    ({"x": torch.zeros(4, 8)}, "topk_ids"),
    ({"topk_weights": torch.zeros(3, 3)}, "topk_weights"),
    ({"topk_weights": torch.zeros(3, 2, dtype=BF16)}, "topk_weights"),
    ({"topk_ids": torch.zeros(3, 2, dtype=torch.int64)}, "topk_ids"),
    ({"topk_ids": torch.zeros(3, dtype=torch.int32)}, "topk_ids"),
    ({"topk_ids": torch.zeros(3, 0, dtype=torch.int32)}, "topk_ids"),
    ({"topk_ids": torch.full((3, 2), 4, dtype=torch.int32)}, "topk_ids: expected -1 or 0 <= id < 4: got 4 for token 0"),
    ({"topk_ids": torch.full((3, 2), -2, dtype=torch.int32)}, "topk_ids"),
    ({"gate_up_proj": torch.zeros(4, 11, 8)}, "gate_up_proj"),
    ({"gate_up_proj": torch.zeros(5, 12, 8)}, "gate_up_proj"),
    ({"gate_up_proj": torch.zeros(4, 12, 9)}, "gate_up_proj"),
    ({"gate_up_proj": torch.zeros(12, 8)}, "gate_up_proj"),
    ({"gate_up_proj": torch.zeros(4, 12, 8, dtype=BF16)}, "gate_up_proj"),
    ({"down_proj": torch.zeros(8, 6)}, "down_proj"),
    ({"down_proj": torch.zeros(4, 9, 6)}, "down_proj"),
    ({"down_proj": torch.zeros(4, 8, 6, dtype=BF16)}, "down_proj"),
    ({"gate_up_proj": torch.zeros(0, 12, 8), "down_proj": torch.zeros(0, 8, 6)}, "expert"),
    ({"gate_up_proj": torch.zeros(4, 0, 8), "down_proj": torch.zeros(4, 8, 0)}, "K >= 1|I >= 1"),
]


@pytest.mark.parametrize("leaf", [False, True])
@pytest.mark.parametrize(("change", "name"), BAD)
def test_bad_arguments_are_refused(change: dict[str, torch.Tensor], name: str, leaf: bool) -> None:
    good = {
        "x": torch.zeros(3, 8),
        "topk_weights": torch.zeros(3, 2),
        "topk_ids": torch.tensor([[0, 1], [2, -1], [3, 0]], dtype=torch.int32),
        "gate_up_proj": torch.zeros(4, 12, 8),
        "down_proj": torch.zeros(4, 8, 6),
    }
    kwargs = {**good, **change}
    ops.moe_mlp(**good)
    with pytest.raises(ValueError, match=name):
        ops.moe_mlp(**with_grad(kwargs, ("x",) if leaf else ()))


def test_the_op_checks_its_workspaces() -> None:
    kwargs = expert_operands(3, 2, 4, 8, 6, torch.float32)
    room = {"out": (3, 8), "plan": (4 + 1 + 12,), "h": (6, 6), "rows": (6, 8)}
    buffers = {name: torch.zeros(shape, dtype=torch.int32 if name == "plan" else None) for name, shape in room.items()}
    torch.ops.glmx.moe_mlp(**buffers, **kwargs)
    assert same_bits(buffers["out"], ops.moe_mlp(**kwargs))
    for name, buffer in buffers.items():
        with pytest.raises(RuntimeError, match=f"{name}: expected size"):
            torch.ops.glmx.moe_mlp(**{**buffers, name: buffer[:-1]}, **kwargs)
