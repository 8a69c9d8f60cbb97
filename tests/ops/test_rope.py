"""rope and rope_cos_sin: angles against 60-digit arithmetic, rotation bit for bit against the oracle; X2; errors."""

from __future__ import annotations

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmx import ops, reference
from tests.ops.cases import BF16, DTYPES, F32, Case, cases, cotangent, evaluate, same_bits, values
from tests.ops.checks import F64, U32, UNIT, assert_within
from tests.ops.properties import check_rows_stand_alone


@pytest.mark.parametrize("case", cases("rope_cos_sin"), ids=str)
def test_angles_against_the_oracle(case: Case) -> None:
    kwargs = case.make()
    got, exact = ops.rope_cos_sin(**kwargs), reference.rope_cos_sin(**kwargs, exact=True)
    for name, a, b in zip(("cos", "sin"), got, exact, strict=True):
        assert a.dtype == F32
        # One rounding, and the oracle's own angle is off by a few fp64 units of the position.
        slack = 8 * 2.0**-53 * kwargs["positions"].to(F64)[:, None]
        assert_within(a, b, U32 * b.abs() * 1.0001 + slack, name)


@pytest.mark.parametrize(("rotary_dim", "theta"), [(64, 1e6), (64, 8e6), (8, 1e4), (2, 1e4)])
def test_angles_are_correctly_rounded(rotary_dim: int, theta: float) -> None:
    positions = torch.tensor([0, 1, 3, 1000, 131_071, 999_999, 1_000_000, 1_048_575])
    cos, sin = ops.rope_cos_sin(positions, rotary_dim, theta)
    want_cos, want_sin = torch.empty_like(cos), torch.empty_like(sin)
    with mpmath.workdps(60):
        for t, position in enumerate(positions.tolist()):
            for i in range(rotary_dim // 2):
                angle = position * mpmath.mpf(theta) ** (-mpmath.mpf(2 * i) / rotary_dim)
                want_cos[t, i] = round_once(mpmath.cos(angle))
                want_sin[t, i] = round_once(mpmath.sin(angle))
    assert same_bits(cos, want_cos) and same_bits(sin, want_sin)


def round_once(value: mpmath.mpf) -> float:
    with mpmath.workprec(24):
        return float(+value)


def test_angles_do_not_depend_on_the_other_positions() -> None:
    positions = torch.tensor([5, 1_000_000, 0, 77])
    cos, sin = ops.rope_cos_sin(positions, 64, 1e6)
    for t in range(4):
        one_cos, one_sin = ops.rope_cos_sin(positions[t : t + 1], 64, 1e6)
        assert same_bits(one_cos[0], cos[t]) and same_bits(one_sin[0], sin[t])


@pytest.mark.parametrize("case", cases("rope", wild=False), ids=str)
def test_rotation_has_the_bits_of_the_oracle(case: Case) -> None:
    """Every product and sum is rounded by contract, so nothing is left to tolerance."""
    kwargs = case.make()
    got = evaluate(ops, case)
    assert same_bits(got["out"] + 0, reference.rope(**kwargs) + 0)  # + 0: the sign of a zero is not compared
    dy = cotangent("out", got["out"])
    want = reference.rope(dy, kwargs["cos"], -kwargs["sin"], interleaved=kwargs["interleaved"])
    assert same_bits(got["d_x"] + 0, want + 0)


@pytest.mark.parametrize("case", cases("rope", wild=False), ids=str)
def test_against_the_exact_rotation_and_its_autograd(case: Case) -> None:
    kwargs = case.make()
    got = evaluate(ops, case)
    u = UNIT[got["out"].dtype]
    leaf = kwargs["x"].to(F64).requires_grad_()
    exact = reference.rope(**{**kwargs, "x": leaf}, exact=True)
    dy = cotangent("out", got["out"])
    exact.backward(dy.to(F64))
    for name, a, b, x in (("out", got["out"], exact, kwargs["x"]), ("x", got["d_x"], leaf.grad, dy)):
        # cos, the product and the sum are rounded: two units of each product, one of the sum.
        sizes = {**kwargs, "x": x.abs(), "cos": kwargs["cos"].abs(), "sin": kwargs["sin"].abs()}
        plus = reference.rope(**sizes, exact=True).abs()
        minus = reference.rope(**{**sizes, "sin": -sizes["sin"]}, exact=True).abs()
        rotated = torch.maximum(plus, minus)  # |a cos| + |b sin| in every place
        assert_within(a, b, 2.1 * u * rotated + u * b.detach().abs(), name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_dims_behind_the_rotation_are_copied_and_position_zero_is_the_identity(
    dtype: torch.dtype, interleaved: bool
) -> None:
    x = values(3, 2, 20, dtype=dtype)
    x[0, 0, 19] = float("nan")
    cos, sin = ops.rope_cos_sin(torch.tensor([0, 4, 9]), 8, 1e4)
    got = ops.rope(x, cos, sin, interleaved=interleaved)
    assert same_bits(got[..., 8:], x[..., 8:]) and torch.equal(got[0, 1], x[0, 1])
    assert not got[..., :8].isnan().any()


@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 20), st.integers(0, 9), st.integers(0, 99), st.booleans())
@settings(max_examples=30, deadline=None)
def test_x2_a_token_does_not_see_the_others(T: int, A: int, half: int, rest: int, seed: int, inter: bool) -> None:
    dtype = DTYPES[seed % 2]
    rows = {
        "x": values(T, A, 2 * half + rest, seed=seed, dtype=dtype),
        "cos": values(T, half, seed=seed + 1, scale=0.5),
        "sin": values(T, half, seed=seed + 2, scale=0.5),
    }
    check_rows_stand_alone(lambda x, cos, sin: ops.rope(x, cos, sin, interleaved=inter), rows, seed, ("x",))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"x": torch.zeros(4, 2, 8, dtype=torch.float16)}, "x"),
        ({"x": torch.zeros(4, 16)}, "x"),
        ({"cos": torch.zeros(3, 2)}, "cos"),
        ({"cos": torch.zeros(4, 2, dtype=BF16)}, "cos"),
        ({"sin": torch.zeros(4, 3)}, "sin"),
        ({"cos": torch.zeros(4, 5), "sin": torch.zeros(4, 5)}, "cos"),
    ],
)
def test_bad_arguments_of_rope_are_refused(change: dict, name: str) -> None:
    good = {"x": torch.zeros(4, 2, 8), "cos": torch.zeros(4, 2), "sin": torch.zeros(4, 2)}
    with pytest.raises(ValueError, match=name):
        ops.rope(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"positions": torch.tensor([[0]])}, "positions"),
        ({"positions": torch.tensor([0], dtype=torch.int32)}, "positions"),
        ({"positions": torch.tensor([-1])}, "position"),
        ({"rotary_dim": 3}, "rotary_dim"),
        ({"rotary_dim": 0}, "rotary_dim"),
        ({"theta": 0.0}, "theta"),
        ({"theta": float("nan")}, "theta"),
    ],
)
def test_bad_arguments_of_rope_cos_sin_are_refused(change: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ops.rope_cos_sin(**{"positions": torch.tensor([0, 1]), "rotary_dim": 4, "theta": 1e4, **change})
