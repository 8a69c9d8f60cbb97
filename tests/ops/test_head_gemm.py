"""head_gemm and its gradients: bits against the emulated tree, values against fp64; views; X2; main_grad; errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmx import ops, reference
from glmx.reference.gemm_tree import flush32, gemm_tree, round32_sum
from tests.ops.cases import BF16, DTYPES, F32, Case, cases, cotangent, evaluate, same_bits, tag, values, with_grad
from tests.ops.checks import F64, assert_within, gemm_bound, rounding
from tests.ops.properties import check_rows_stand_alone


def tree(x_TAK: torch.Tensor, w: torch.Tensor, transposed: bool) -> torch.Tensor:
    """fp32 [T, A, N] by the tree, head by head."""
    heads = range(x_TAK.shape[1])
    return torch.stack([gemm_tree(x_TAK[:, a], w[a].T if transposed else w[a]) for a in heads], 1)


def tree_gradients(kwargs: dict, dy_TAN: torch.Tensor) -> dict[str, torch.Tensor]:
    x, w, transposed = kwargs["x"], kwargs["w"], kwargs["transposed"]
    dy = dy_TAN.to(x.dtype)
    rows, columns = (x, dy) if transposed else (dy, x)
    dw = torch.stack([gemm_tree(rows[:, a].T, columns[:, a].T) for a in range(w.shape[0])])
    return {"d_x": tree(dy, w, not transposed), "d_w": dw}


def small(case: Case) -> bool:
    return not any(size in case.name for size in ("300x", "262x"))  # the emulation is slow


@pytest.mark.parametrize("case", [c for c in cases("head_gemm") if small(c)], ids=str)
def test_bits_of_the_tree(case: Case) -> None:
    kwargs = case.make()
    got = evaluate(ops, case)
    want = {"out": tree(kwargs["x"], kwargs["w"], kwargs["transposed"])}
    if case.grads:
        want |= tree_gradients(kwargs, cotangent("out", got["out"]))
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert same_bits(tensor, want[name].to(tensor.dtype)), name


@pytest.mark.parametrize("case", cases("head_gemm", wild=False), ids=str)
def test_against_the_oracle(case: Case) -> None:
    kwargs = case.make()
    got = evaluate(ops, case)
    exact = with_grad(kwargs, case.grads, F64)
    want = reference.head_gemm(**exact, exact=True)
    x, w, transposed = kwargs["x"], kwargs["w"], kwargs["transposed"]
    for a in range(w.shape[0]):
        bound = gemm_bound(x[:, a], w[a].T if transposed else w[a])
        assert_within(got["out"][:, a], want[:, a], bound * 1.01 + rounding(want[:, a], got["out"].dtype), f"head {a}")
    if not case.grads:
        return
    dy = cotangent("out", got["out"]).to(x.dtype)
    want.backward(dy.to(F64))
    for a in range(w.shape[0]):
        dx, dw = exact["x"].grad[:, a], exact["w"].grad[a]
        bound = gemm_bound(dy[:, a], w[a] if transposed else w[a].T)
        assert_within(got["d_x"][:, a], dx, bound * 1.01 + rounding(dx, x.dtype), f"d_x, head {a}")
        rows, columns = (x, dy) if transposed else (dy, x)
        bound = gemm_bound(rows[:, a].T, columns[:, a].T)
        assert_within(got["d_w"][a], dw, bound * 1.01 + rounding(dw, x.dtype), f"d_w, head {a}")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_have_the_bits_of_copies_and_nothing_else_is_written(dtype: torch.dtype, transposed: bool) -> None:
    name = f"{tag(dtype)}-{'kn' if transposed else 'nk'}-views"
    kwargs = next(c for c in cases("head_gemm") if c.name == name).make()
    x, w, out = kwargs["x"], kwargs["w"], kwargs["out"]
    whole = torch.full((6, 3, 60), 5.0, dtype=dtype)
    view = whole[..., 7 : 7 + out.shape[-1]]
    assert ops.head_gemm(x, w, transposed=transposed, out=view) is view
    copies = ops.head_gemm(x.contiguous(), w.contiguous(), transposed=transposed)
    assert same_bits(view.contiguous(), copies)
    view.fill_(5.0)
    assert (whole == 5.0).all()


def test_both_halves_of_a_latent_projection() -> None:
    """kv_b_proj [A (dn + dv), rkv]: absorbing its first part and applying its second equal the plain products."""
    A, dn, dv, rkv = 3, 8, 6, 20
    weight_AdK = values(A * (dn + dv), rkv).view(A, dn + dv, rkv)
    q, latent = values(4, A, dn + 2, seed=1), values(4, A, rkv, seed=2)
    absorbed = ops.head_gemm(q[..., :dn], weight_AdK[:, :dn], transposed=True)
    value = ops.head_gemm(latent, weight_AdK[:, dn:])
    torch.testing.assert_close(absorbed, torch.einsum("tan,anr->tar", q[..., :dn], weight_AdK[:, :dn]))
    torch.testing.assert_close(value, torch.einsum("tar,avr->tav", latent, weight_AdK[:, dn:]))


@given(
    st.integers(1, 12),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 70),
    st.booleans(),
    st.integers(0, 999),
    st.sampled_from(DTYPES),
)
@settings(max_examples=40, deadline=None)
def test_x2_a_token_does_not_see_the_others(
    T: int, A: int, N: int, K: int, transposed: bool, seed: int, dtype: torch.dtype
) -> None:
    w = values(A, *((K, N) if transposed else (N, K)), seed=seed + 1, dtype=dtype)
    x = values(T, A, K, seed=seed, dtype=dtype)
    check_rows_stand_alone(lambda x: ops.head_gemm(x, w, transposed=transposed), {"x": x}, seed, ("x",))


@pytest.mark.parametrize("dtype", DTYPES)
def test_main_grad_of_the_parameter_behind_the_views(dtype: torch.dtype) -> None:
    """Each view adds to its own rows of the parameter's main_grad; the trainer's buffer is never copied."""
    A, dn, dv, rkv = 3, 5, 7, 18
    weight = torch.nn.Parameter(values(A * (dn + dv), rkv, dtype=dtype))
    q, latent = values(9, A, dn, seed=1, dtype=dtype), values(9, A, rkv, seed=2, dtype=dtype)

    def backward() -> None:
        heads = weight.view(A, dn + dv, rkv)
        ops.head_gemm(q, heads[:, :dn], transposed=True).backward(latent)
        ops.head_gemm(latent, heads[:, dn:]).backward(values(9, A, dv, seed=3, dtype=dtype))

    backward()
    plain, weight.grad = weight.grad, None
    start = values(A * (dn + dv), rkv, seed=4)
    weight.main_grad = torch.zeros_like(start)
    backward()
    assert weight.grad is None and same_bits(weight.main_grad.to(dtype), plain)
    once = weight.main_grad
    weight.main_grad = start.clone()
    backward()
    assert same_bits(weight.main_grad, round32_sum(flush32(start.to(F64)), once.to(F64)).float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_main_grad_of_a_plain_parameter(dtype: torch.dtype) -> None:
    x, w = values(9, 2, 6, dtype=dtype), values(2, 5, 6, seed=1, dtype=dtype).requires_grad_()
    dy = values(9, 2, 5, seed=2, dtype=dtype)
    ops.head_gemm(x, w).backward(dy)
    plain, w.grad, w.main_grad = w.grad, None, torch.zeros(2, 5, 6)
    ops.head_gemm(x, w).backward(dy)
    assert w.grad is None and same_bits(w.main_grad.to(dtype), plain)


def test_strided_inputs_and_gradients_are_taken() -> None:
    wide, w = values(4, 2, 20), values(2, 5, 10, seed=1)
    assert same_bits(ops.head_gemm(wide[..., ::2], w), ops.head_gemm(wide[..., ::2].contiguous(), w))
    leaf, other = values(4, 2, 10).requires_grad_(), values(4, 2, 10).requires_grad_()
    ops.head_gemm(leaf, w).sum().backward()  # an expanded gradient, stride 0
    ops.head_gemm(other, w).backward(torch.ones(4, 2, 5))
    assert same_bits(leaf.grad, other.grad)


GOOD = {"x": torch.zeros(3, 2, 8), "w": torch.ones(2, 5, 8)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(3, 2, 8, dtype=torch.float64)}, "x: expected dtype"),
        ({"x": torch.zeros(6, 8)}, "x: expected 3 dimensions"),
        ({"w": torch.ones(5, 8)}, "w: expected 3 dimensions"),
        ({"w": torch.ones(2, 5, 8, dtype=BF16)}, "w: expected dtype"),
        ({"w": torch.ones(3, 5, 8)}, "w.shape.0. == 2"),
        ({"w": torch.ones(2, 5, 7)}, "w.shape.2. == 8"),
        ({"transposed": True}, "w.shape.1. == 8"),
        ({"w": torch.ones(2, 5, 16)[..., ::2]}, "w: expected stride 1"),
        ({"w": torch.ones(2, 0, 8)}, "N >= 1"),
        ({"out": torch.zeros(3, 2, 6)}, "out: expected shape .3, 2, 5."),
        ({"out": torch.zeros(3, 2, 5, dtype=BF16)}, "out"),
        ({"out": torch.zeros(3, 2, 10)[..., ::2]}, "y: expected stride 1"),
        ({"out": torch.zeros(3, 1, 5).expand(3, 2, 5)}, "y: expected elements that do not overlap"),
        ({"out": torch.zeros(1, 2, 5).expand(3, 2, 5)}, "y: expected elements that do not overlap"),
        ({"out_dtype": BF16}, "out_dtype"),
        ({"x": torch.zeros(3, 2, 8, requires_grad=True), "out": torch.zeros(3, 2, 5)}, "out: expected None"),
    ],
)
def test_bad_arguments_are_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ops.head_gemm(**{**GOOD, **change})


def test_no_tokens() -> None:
    w = values(2, 5, 8).requires_grad_()
    y = ops.head_gemm(torch.zeros(0, 2, 8, dtype=F32), w)
    y.sum().backward()
    assert y.shape == (0, 2, 5) and (w.grad == 0).all()
