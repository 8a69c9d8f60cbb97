"""add_rms_norm: the bits of an add followed by rms_norm; gradients against the fp64 oracle; X2; errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmx import ops, reference
from tests.ops.cases import BF16, DTYPES, Case, cases, cotangent, evaluate, same_bits, values, with_grad
from tests.ops.checks import F64, TINY, UNIT, assert_within
from tests.ops.properties import check_rows_stand_alone
from tests.ops.test_rms_norm import forward_bound, gradient_bounds


@pytest.mark.parametrize("case", cases("add_rms_norm", wild=False), ids=str)
def test_forward(case: Case) -> None:
    kwargs = case.make()
    y, residual_out = ops.add_rms_norm(**kwargs)
    # The sum of two fp32 or bf16 numbers, rounded once, is what torch's add gives.
    assert same_bits(residual_out, kwargs["x"] + kwargs["residual"])
    exact = reference.rms_norm(residual_out, kwargs["weight"], kwargs["eps"], exact=True)
    assert_within(y, exact, forward_bound(exact, kwargs["weight"], y.dtype))
    assert same_bits(y, ops.rms_norm(residual_out, kwargs["weight"], kwargs["eps"]))


@pytest.mark.parametrize("case", cases("add_rms_norm", wild=False), ids=str)
def test_gradients(case: Case) -> None:
    kwargs = case.make()
    got = evaluate(ops, case)
    total = got["out1"]
    exact = with_grad({"x": total, "weight": kwargs["weight"]}, ("x", "weight"), F64)
    y = reference.rms_norm(exact["x"], exact["weight"], kwargs["eps"], exact=True)
    dy, d_total = cotangent("out0", got["out0"]), cotangent("out1", total)
    y.backward(dy.to(F64))
    bounds = gradient_bounds(total, kwargs["weight"], dy, kwargs["eps"])
    u = UNIT[total.dtype]
    want = exact["x"].grad + d_total.to(F64)
    bound = bounds["x"] + u * (exact["x"].grad.abs() + want.abs()) + TINY
    assert_within(got["d_x"], want, bound, "x")
    assert_within(got["d_weight"], exact["weight"].grad, bounds["weight"], "weight")
    assert same_bits(got["d_x"], got["d_residual"])


@pytest.mark.parametrize("used", ["y", "residual_out"])
def test_one_output_alone_has_gradients(used: str) -> None:
    x, residual = values(3, 20).requires_grad_(), values(3, 20, seed=1).requires_grad_()
    w = values(20, seed=2).requires_grad_()
    y, total = ops.add_rms_norm(x, residual, w, 1e-5)
    if used == "y":
        y.sum().backward()
        leaf = total.detach().requires_grad_()
        ops.rms_norm(leaf, w.detach(), 1e-5).sum().backward()
        assert same_bits(x.grad, leaf.grad) and same_bits(residual.grad, leaf.grad)
    else:
        total.sum().backward()
        assert torch.equal(x.grad, torch.ones(3, 20)) and torch.equal(residual.grad, torch.ones(3, 20))


@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 1000), st.sampled_from(DTYPES))
@settings(max_examples=25, deadline=None)
def test_x2_a_row_does_not_see_the_others(T: int, H: int, seed: int, dtype: torch.dtype) -> None:
    rows = {"x": values(T, H, seed=seed, dtype=dtype), "residual": values(T, H, seed=seed + 1, dtype=dtype)}
    w = values(H, seed=seed + 2, dtype=dtype)
    check_rows_stand_alone(lambda x, residual: ops.add_rms_norm(x, residual, w, 1e-5), rows, seed, ("x", "residual"))


def test_main_grad() -> None:
    x, w = values(70, 24), values(24, seed=1).requires_grad_()
    ops.add_rms_norm(x, x, w, 1e-5)[0].backward(x)
    plain, w.grad = w.grad, None
    w.main_grad = torch.zeros(24)
    ops.add_rms_norm(x, x, w, 1e-5)[0].backward(x)
    assert w.grad is None and same_bits(w.main_grad, plain)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.float16)}, "x"),
        ({"residual": torch.zeros(2, 7)}, "residual"),
        ({"residual": torch.zeros(2, 8, dtype=BF16)}, "residual"),
        ({"weight": torch.ones(7)}, "weight"),
        ({"weight": torch.ones(8, dtype=BF16)}, "weight"),
        ({"eps": -1.0}, "eps"),
    ],
)
def test_bad_arguments_are_refused(change: dict, name: str) -> None:
    good = {"x": torch.zeros(2, 8), "residual": torch.zeros(2, 8), "weight": torch.ones(8), "eps": 1e-5}
    with pytest.raises(ValueError, match=name):
        ops.add_rms_norm(**{**good, **change})
