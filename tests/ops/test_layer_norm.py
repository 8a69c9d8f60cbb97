"""layer_norm against its fp64 oracle, with its gradients; X2; main_grad; errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmx import ops, reference
from tests.ops.cases import BF16, DTYPES, F32, NAN, Case, cases, cotangent, evaluate, same_bits, values, with_grad
from tests.ops.checks import F64, TINY, U32, UNIT, assert_within
from tests.ops.properties import check_rows_stand_alone


def normed_and_bound(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """n and rstd exactly (fp64), and what fp32 may lose of n.

    The mean is off by (H/16 + 5) units of mean|x|: so is every x - mean, beside its own rounding. The variance
    gains the square of that shift, which is no more than 2 |x - mean| of it on average, and H/16 + 6 units of its
    own; the root halves them. Then a root, a division and a product.
    """
    H = x.shape[-1]
    x = x.detach().to(F64)
    centred = x - x.mean(-1, keepdim=True)
    r = 1 / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    chain = (H / 16 + 6) * U32
    shift = chain * x.abs().mean(-1, keepdim=True) + U32 * centred.abs()
    relative = chain + r * r * (shift * centred.abs() + shift * shift).mean(-1, keepdim=True) + 4 * U32
    return centred * r, r, 1.01 * (r * shift + (centred * r).abs() * relative) + TINY


@pytest.mark.parametrize("case", cases("layer_norm", wild=False), ids=str)
def test_forward(case: Case) -> None:
    kwargs = case.make()
    exact = reference.layer_norm(**kwargs, exact=True)
    got = ops.layer_norm(**kwargs)
    assert got.dtype == kwargs["x"].dtype
    _, _, bound_n = normed_and_bound(kwargs["x"], kwargs["eps"])
    before = bound_n * kwargs["weight"].to(F64).abs() + U32 * exact.abs()
    assert_within(got, exact, before + UNIT[got.dtype] * (exact.abs() + before) + TINY)


def gradient_bounds(x, w, dy, eps) -> dict[str, torch.Tensor]:
    """dx = r (g - mean g - n mean(g n)), g = dy w; d_weight = sum of dy n, d_bias = sum of dy over the rows.

    Each term is off by its own chain of additions and by the error of n; r by no more than n relatively.
    """
    u, H = UNIT[x.dtype], x.shape[-1]
    T = max(1, x.numel() // H)
    n, r, bound_n = normed_and_bound(x, eps)
    w, dy = w.detach().to(F64), dy.detach().to(F64)
    g = dy * w
    chain = (H / 16 + 12) * U32
    mean = lambda t: t.mean(-1, keepdim=True)
    exact_dx = r * (g - mean(g) - n * mean(g * n))
    size = g.abs() + mean(g.abs()) + n.abs() * mean((g * n).abs())
    relative_r = (bound_n.amax(-1, keepdim=True) + chain) / n.abs().amax(-1, keepdim=True).clamp(min=1.0)
    lost = bound_n * mean((g * n).abs()) + n.abs() * mean(g.abs() * bound_n)
    dx = r * (size * (2 * chain + relative_r) + lost) * 1.1
    rows = lambda t: t.reshape(-1, H).sum(0)
    exact_dw, exact_db = rows(dy * n), rows(dy)
    sums = (T + 3) * U32
    dw = rows((dy * n).abs()) * sums + rows(dy.abs() * bound_n) * 1.01
    return {
        "x": dx + u * (exact_dx.abs() + dx) + TINY,
        "weight": dw + u * (exact_dw.abs() + dw) + TINY * (T + 1),
        "bias": rows(dy.abs()) * sums * 1.01 + u * exact_db.abs() * 1.01 + TINY * (T + 1),
    }


@pytest.mark.parametrize("case", cases("layer_norm", wild=False), ids=str)
def test_gradients(case: Case) -> None:
    kwargs = case.make()
    got = evaluate(ops, case)
    exact = with_grad(kwargs, case.grads, F64)
    y = reference.layer_norm(**exact, exact=True)
    dy = cotangent("out", got["out"])
    y.backward(dy.to(F64))
    bounds = gradient_bounds(kwargs["x"], kwargs["weight"], dy, kwargs["eps"])
    for name in case.grads:
        assert got[f"d_{name}"].dtype == kwargs[name].dtype
        assert_within(got[f"d_{name}"], exact[name].grad, bounds[name], name)


def test_bf16_is_rounded_once() -> None:
    """The oracle rounds once; fp32 arithmetic crosses a rounding edge in 1 element of 2^12 or so (the sum with the
    bias cancels). With the normalised row rounded too, a fifth of them would differ."""
    x, w, b = values(64, 96, dtype=BF16), values(96, seed=1, dtype=BF16), values(96, seed=2, dtype=BF16)
    got = ops.layer_norm(x, w, b, 1e-6)
    assert (got != reference.layer_norm(x, w, b, 1e-6)).float().mean() < 0.002


def test_a_constant_row_gives_the_bias() -> None:
    x, b = torch.full((2, 40), 8.0), values(40)
    assert same_bits(ops.layer_norm(x, values(40, seed=1), b, 1e-6), b.expand(2, 40).contiguous())


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_in_their_row(dtype: torch.dtype) -> None:
    x, one = values(4, 20, dtype=dtype), torch.ones(20, dtype=dtype)
    clean = ops.layer_norm(x, one, one, 1e-6)
    x[1, 3], x[2, 19] = NAN, float("inf")
    got = ops.layer_norm(x, one, one, 1e-6)
    assert got[[1, 2]].isnan().all() and same_bits(got[[0, 3]], clean[[0, 3]])


@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 1000), st.sampled_from(DTYPES))
@settings(max_examples=40, deadline=None)
def test_x2_a_row_does_not_see_the_others(T: int, H: int, seed: int, dtype: torch.dtype) -> None:
    w, b = values(H, seed=seed + 1, dtype=dtype), values(H, seed=seed + 2, dtype=dtype)
    x = values(T, H, seed=seed, dtype=dtype)
    check_rows_stand_alone(lambda x: ops.layer_norm(x, w, b, 1e-6), {"x": x}, seed, ("x",))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("owned", [("weight",), ("bias",), ("weight", "bias")])
def test_main_grad_receives_its_gradient(dtype: torch.dtype, owned: tuple[str, ...]) -> None:
    x = values(70, 24, dtype=dtype)
    params = {n: values(24, seed=i, dtype=dtype).requires_grad_() for i, n in enumerate(("weight", "bias"))}
    ops.layer_norm(x, **params, eps=1e-6).backward(x)
    plain = {name: p.grad for name, p in params.items()}
    for p in params.values():
        p.grad = None
    for name in owned:
        params[name].main_grad = torch.zeros(24)
    ops.layer_norm(x, **params, eps=1e-6).backward(x)
    once = {name: params[name].main_grad.clone() for name in owned}
    for name, p in params.items():
        assert (p.grad is None) == (name in owned)
        assert same_bits(once[name].to(dtype) if name in owned else p.grad, plain[name])
    ops.layer_norm(x, **params, eps=1e-6).backward(x)
    for name in owned:
        assert same_bits(params[name].main_grad, once[name] + once[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_and_gradients_are_taken(dtype: torch.dtype) -> None:
    wide = values(6, 40, dtype=dtype)
    x, w, b = wide[:, ::2], values(20, seed=1, dtype=dtype), values(20, seed=2, dtype=dtype)
    assert same_bits(ops.layer_norm(x, w, b, 1e-6), ops.layer_norm(x.contiguous(), w, b, 1e-6))
    leaf, other = x.contiguous().requires_grad_(), x.contiguous().requires_grad_()
    ops.layer_norm(leaf, w, b, 1e-6).sum().backward()  # an expanded gradient, stride 0
    ops.layer_norm(other, w, b, 1e-6).backward(torch.ones(6, 20, dtype=dtype))
    assert same_bits(leaf.grad, other.grad)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.float64)}, "x"),
        ({"x": torch.zeros(())}, "weight"),
        ({"weight": torch.ones(7)}, "weight"),
        ({"weight": torch.ones(8, dtype=BF16)}, "weight"),
        ({"bias": torch.ones(1, 8)}, "bias"),
        ({"bias": torch.ones(8, dtype=BF16)}, "bias"),
        ({"eps": -1.0}, "eps"),
        ({"eps": NAN}, "eps"),
    ],
)
def test_bad_arguments_are_refused(change: dict, name: str) -> None:
    good = {"x": torch.zeros(2, 8, dtype=F32), "weight": torch.ones(8), "bias": torch.ones(8), "eps": 1e-6}
    with pytest.raises(ValueError, match=name):
        ops.layer_norm(**{**good, **change})
