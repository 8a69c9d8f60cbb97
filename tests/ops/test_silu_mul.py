"""silu_mul against its fp64 oracle, forward and backward; the whole range; X2; errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmx import ops, reference
from tests.ops.cases import DTYPES, INF, NAN, Case, cases, cotangent, evaluate, same_bits, values, with_grad
from tests.ops.checks import F64, TINY, U32, UNIT, assert_within
from tests.ops.properties import check_rows_stand_alone

SILU_UNITS = 6  # exp within 1.5 ulp (3 units), the sum, the division, and the product with up


def backward_bound(x: torch.Tensor, dy: torch.Tensor, u: float) -> torch.Tensor:
    """d_gate = dy up s (1 + gate (1 - s)), d_up = dy gate s. The bracket cancels near gate = -1.28 and 1 - s
    loses its relative accuracy for large gates, so its error is bounded by units of its terms.
    """
    gate, up = x.to(F64).chunk(2, 1)
    dy = dy.to(F64).abs()
    s = torch.sigmoid(gate)
    slope = s * (1 + gate * (1 - s))
    d_gate = dy * up.abs() * (s * (1 + gate.abs()) * 12 * U32 + slope.abs() * u)
    d_up = dy * (gate * s).abs() * (SILU_UNITS * U32 + u)
    # A sigmoid below 2^-126 is flushed before it meets the other factors.
    floor = TINY * (1 + gate.abs().clamp(max=200)) * (1 + dy) * (1 + up.abs())
    return torch.cat((d_gate + floor, d_up + floor), 1)


@pytest.mark.parametrize("case", cases("silu_mul", wild=False), ids=str)
def test_forward_and_gradient(case: Case) -> None:
    kwargs = case.make()
    got = evaluate(ops, case)
    leaf = with_grad(kwargs, ("x",), F64)
    exact = reference.silu_mul(**leaf, exact=True)
    up = kwargs["x"].to(F64).chunk(2, 1)[1]
    bound = exact.detach().abs() * (SILU_UNITS * U32 + UNIT[got["out"].dtype]) + TINY * (1 + up.abs())
    assert_within(got["out"], exact, bound)
    dy = cotangent("out", got["out"])
    exact.backward(dy.to(F64))
    assert_within(got["d_x"], leaf["x"].grad, backward_bound(kwargs["x"], dy, UNIT[dy.dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_range_of_gates(dtype: torch.dtype) -> None:
    gate = torch.cat((torch.linspace(-120, 120, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e30, 1e30, -1.2784645]))).to(
        dtype
    )
    x = torch.stack((gate, torch.full_like(gate, 3.0)), 1)
    exact = reference.silu_mul(x, exact=True)
    bound = (
        exact.abs() * (SILU_UNITS * U32 + UNIT[dtype]) + TINY * 4 * gate.to(F64).abs().clamp(min=1, max=200)[:, None]
    )
    assert_within(ops.silu_mul(x), exact, bound)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinities(dtype: torch.dtype) -> None:
    gate = torch.tensor([NAN, 1.0, INF, INF, 2.0, 0.0, -100.0], dtype=dtype)
    up = torch.tensor([1.0, NAN, 1.0, -1.0, -INF, 1.0, 1.0], dtype=dtype)
    got = ops.silu_mul(torch.cat((gate, up))[None])[0]
    assert got[:2].isnan().all()
    assert got[2:5].tolist() == [INF, -INF, -INF] and got[5] == 0 and got[6].abs() <= 2.0**-126


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 1000), st.sampled_from(DTYPES))
@settings(max_examples=25, deadline=None)
def test_x2_a_row_does_not_see_the_others(T: int, I: int, seed: int, dtype: torch.dtype) -> None:
    check_rows_stand_alone(ops.silu_mul, {"x": values(T, 2 * I, seed=seed, dtype=dtype, scale=3)}, seed, ("x",))


@given(st.integers(1, 40), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_x2_an_element_does_not_see_its_column(I: int, seed: int) -> None:
    """Vector tails run the same code: a wider row with the same values in other lanes gives the same bits."""
    x = values(2, 2 * I, seed=seed, scale=3)
    gate, up = x.chunk(2, 1)
    wide = torch.cat((gate[:, :1], gate, up[:, :1], up), 1)
    assert same_bits(ops.silu_mul(wide)[:, 1:], ops.silu_mul(x))


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 3),
        torch.zeros(8),
        torch.zeros(2, 4, 4),
        torch.zeros(2, 4, dtype=torch.float16),
        torch.zeros(2, 0),
    ],
    ids=["odd", "1-d", "3-d", "fp16", "empty"],
)
def test_bad_arguments_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="x"):
        ops.silu_mul(x)
