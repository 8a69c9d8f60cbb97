"""rms_norm against its fp64 oracle, with its gradients; X2; main_grad; errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmx import ops, reference
from tests.ops.cases import BF16, DTYPES, F32, NAN, Case, cases, cotangent, evaluate, same_bits, values, with_grad
from tests.ops.checks import F64, TINY, U32, UNIT, assert_within
from tests.ops.properties import check_rows_stand_alone


def forward_bound(exact: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Two roundings to the dtype; in fp32: H/16 + 4 additions of squares (halved by the root), / H, + eps,
    sqrt, /, *."""
    u = UNIT[dtype]
    chain = (exact.shape[-1] / 16 + 4) / 2 + 5
    return exact.abs() * (2 * u + u * u + chain * U32) + TINY * (1 + weight.to(F64).abs())


@pytest.mark.parametrize("case", cases("rms_norm", wild=False), ids=str)
def test_forward(case: Case) -> None:
    kwargs = case.make()
    exact = reference.rms_norm(**kwargs, exact=True)
    got = ops.rms_norm(**kwargs)
    assert got.dtype == kwargs["x"].dtype
    assert_within(got, exact, forward_bound(exact, kwargs["weight"], got.dtype))


def gradient_bounds(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor, eps: float) -> dict[str, torch.Tensor]:
    """dx = r (g - n mean(g n)), g = dy w, n = x r; d_weight = sum over rows of dy round(n).

    fp32 error of each part, against the sum of absolute values; n itself is off by (chain) units, and is
    rounded to the dtype before it meets the weight.
    """
    u, H = UNIT[x.dtype], x.shape[-1]
    T = max(1, x.numel() // H)
    x, w, dy = (t.detach().to(F64) for t in (x, w, dy))
    r = 1 / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
    n, g = x * r, dy * w
    chain = H / 16 + 16
    dx = r * (g.abs() + n.abs() * (g * n).abs().mean(-1, keepdim=True)) * 3 * chain * U32
    exact_dx = r * (g - n * (g * n).mean(-1, keepdim=True))
    dw_sum = (dy * n).abs().reshape(-1, H).sum(0)
    exact_dw = (dy * n).reshape(-1, H).sum(0)
    dw = dw_sum * ((T + chain) * U32 + u) + u * exact_dw.abs()
    return {"x": dx + u * exact_dx.abs() + TINY, "weight": dw + TINY * (T + 1)}


@pytest.mark.parametrize("case", cases("rms_norm", wild=False), ids=str)
def test_gradients(case: Case) -> None:
    kwargs = case.make()
    got = evaluate(ops, case)
    exact = with_grad(kwargs, case.grads, F64)
    y = reference.rms_norm(**exact, exact=True)
    dy = cotangent("out", got["out"])
    y.backward(dy.to(F64))
    bounds = gradient_bounds(kwargs["x"], kwargs["weight"], dy, kwargs["eps"])
    for name in case.grads:
        assert got[f"d_{name}"].dtype == kwargs[name].dtype
        assert_within(got[f"d_{name}"], exact[name].grad, bounds[name], name)


def test_bf16_rounds_before_the_weight() -> None:
    """The oracle that rounds twice differs only where fp32 arithmetic crosses a rounding edge, 1 in 2^16
    elements or so; one that rounds once differs in a fifth of them.
    """
    x, w = values(64, 96, dtype=BF16), values(96, seed=1, dtype=BF16)
    got = ops.rms_norm(x, w, 1e-5)
    assert (got != reference.rms_norm(x, w, 1e-5)).float().mean() < 0.002
    assert (got != reference.rms_norm(x, w, 1e-5, exact=True).bfloat16()).float().mean() > 0.05


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_in_their_row(dtype: torch.dtype) -> None:
    x = values(4, 20, dtype=dtype)
    clean = ops.rms_norm(x, torch.ones(20, dtype=dtype), 1e-5)
    x[1, 3], x[2, 19] = NAN, float("inf")
    got = ops.rms_norm(x, torch.ones(20, dtype=dtype), 1e-5)
    assert got[1].isnan().all()
    assert got[2, 19].isnan() and (got[2, :19] == 0).all()  # inf * (1 / inf), and finite * 0
    assert same_bits(got[[0, 3]], clean[[0, 3]])


@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 1000), st.sampled_from(DTYPES))
@settings(max_examples=40, deadline=None)
def test_x2_a_row_does_not_see_the_others(T: int, H: int, seed: int, dtype: torch.dtype) -> None:
    w = values(H, seed=seed + 1, dtype=dtype)
    x = values(T, H, seed=seed, dtype=dtype)
    check_rows_stand_alone(lambda x: ops.rms_norm(x, w, 1e-5), {"x": x}, seed, ("x",))


@pytest.mark.parametrize("dtype", DTYPES)
def test_main_grad_receives_the_weight_gradient(dtype: torch.dtype) -> None:
    x, w = values(70, 24, dtype=dtype), values(24, seed=1, dtype=dtype).requires_grad_()
    ops.rms_norm(x, w, 1e-5).backward(x)
    plain, w.grad = w.grad, None
    w.main_grad = torch.zeros(24)
    ops.rms_norm(x, w, 1e-5).backward(x)
    assert w.grad is None and same_bits(w.main_grad.to(dtype), plain)
    once = w.main_grad.clone()
    ops.rms_norm(x, w, 1e-5).backward(x)
    assert same_bits(w.main_grad, once + once)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_and_gradients_are_taken(dtype: torch.dtype) -> None:
    wide = values(6, 40, dtype=dtype)
    x, w = wide[:, ::2], values(20, seed=1, dtype=dtype)
    assert same_bits(ops.rms_norm(x, w, 1e-5), ops.rms_norm(x.contiguous(), w, 1e-5))
    leaf = x.contiguous().requires_grad_()
    ops.rms_norm(leaf, w, 1e-5).sum().backward()  # an expanded gradient, stride 0
    other = x.contiguous().requires_grad_()
    ops.rms_norm(other, w, 1e-5).backward(torch.ones(6, 20, dtype=dtype))
    assert same_bits(leaf.grad, other.grad)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.float64)}, "x"),
        ({"x": torch.zeros(2, 8, dtype=torch.int32)}, "x"),
        ({"x": torch.zeros(())}, "weight"),
        ({"weight": torch.ones(7)}, "weight"),
        ({"weight": torch.ones(1, 8)}, "weight"),
        ({"weight": torch.ones(8, dtype=BF16)}, "weight"),
        ({"eps": -1.0}, "eps"),
        ({"eps": NAN}, "eps"),
    ],
)
def test_bad_arguments_are_refused(change: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ops.rms_norm(**{"x": torch.zeros(2, 8, dtype=F32), "weight": torch.ones(8), "eps": 1e-5, **change})
