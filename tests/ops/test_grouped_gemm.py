"""grouped_gemm, dgrad, wgrad, linear: bits against the emulated tree; values and gradients against the fp64
oracle.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glmx import ops, reference
from glmx.reference.gemm_tree import flush32, gemm_tree, round32_sum
from tests.ops.backends import needs_the_cpus_products
from tests.ops.cases import BF16, DTYPES, F32, NAN, Case, cotangent, dense_cases, evaluate, same_bits, values
from tests.ops.checks import F64, TINY, U32, UNIT, assert_within, gemm_bound, gemm_unit, rounding
from tests.ops.test_silu_mul import SILU_UNITS, backward_bound

NAMES = ("grouped_gemm", "grouped_gemm_dgrad", "grouped_gemm_wgrad", "linear")


def as_grouped(kwargs: dict[str, Any]) -> dict[str, Any]:
    """linear's arguments as those of grouped_gemm with one expert."""
    if "expert_offsets" in kwargs:
        return kwargs
    x = kwargs["x"].reshape(-1, kwargs["x"].shape[-1])
    out = {**kwargs, "x": x, "w": kwargs["w"][None]}
    out["expert_offsets"] = torch.tensor([0, x.shape[0]], dtype=torch.int32)
    if "bias" in kwargs:
        out["bias"] = kwargs["bias"][None]
    return out


def token_rows(kwargs: dict[str, Any]) -> torch.Tensor:
    row_token = kwargs.get("row_token")
    return kwargs["x"] if row_token is None else kwargs["x"][row_token.long().clamp(min=0)]


def spans(offsets: torch.Tensor) -> list[slice]:
    bounds = offsets.tolist()
    return [slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


# --- bits
# -------------------------------------------------------------------------------------------------------


def accumulators(kwargs: dict[str, Any]) -> torch.Tensor:
    """fp32 [R, N] by the tree, bias added: what the epilogue gets."""
    rows, w = token_rows(kwargs), kwargs["w"]
    out = torch.zeros(rows.shape[0], w.shape[1])
    for e, span in enumerate(spans(kwargs["expert_offsets"])):
        out[span] = gemm_tree(rows[span], w[e])
        if "bias" in kwargs:
            bias = flush32(kwargs["bias"][e].to(F64)).expand_as(out[span])
            out[span] = round32_sum(out[span].to(F64), bias).float()
    return out


# The epilogue's polynomial is not emulated: silu_mul is judged by the fp64 oracle and by the bits across
# ISAs.
@pytest.mark.parametrize(
    "case", [c for c in dense_cases("grouped_gemm") + dense_cases("linear") if "silu1" not in c.name], ids=str
)
def test_forward_has_the_bits_of_the_tree(case: Case) -> None:
    kwargs = as_grouped(case.make())
    needs_the_cpus_products(kwargs["x"].dtype)
    got = getattr(ops, case.op)(**case.make())
    want = accumulators(kwargs).to(kwargs.get("out_dtype", kwargs["x"].dtype))
    assert same_bits(got.reshape(want.shape), want)


@pytest.mark.parametrize("case", dense_cases("grouped_gemm_dgrad"), ids=str)
def test_dgrad_has_the_bits_of_the_tree(case: Case) -> None:
    kwargs = case.make()
    dy, w = kwargs["dy"], kwargs["w"]
    needs_the_cpus_products(dy.dtype)
    want = torch.zeros(dy.shape[0], w.shape[2])
    for e, span in enumerate(spans(kwargs["expert_offsets"])):
        want[span] = gemm_tree(dy[span], w[e].T)
    assert same_bits(ops.grouped_gemm_dgrad(**kwargs), want.to(kwargs.get("out_dtype", dy.dtype)))


def wgrad_tree(dy: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return torch.stack([gemm_tree(dy[span].T, x[span].T) for span in spans(offsets)])


@pytest.mark.parametrize("case", dense_cases("grouped_gemm_wgrad"), ids=str)
def test_wgrad_has_the_bits_of_the_tree(case: Case) -> None:
    kwargs = case.make()
    needs_the_cpus_products(kwargs["dy"].dtype)
    want = wgrad_tree(kwargs["dy"], kwargs["x"], kwargs["expert_offsets"])
    assert same_bits(ops.grouped_gemm_wgrad(**kwargs), want.to(kwargs.get("out_dtype", kwargs["dy"].dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gather", [False, True])
def test_wgrad_accumulates_one_rounded_sum(dtype: torch.dtype, gather: bool) -> None:
    kwargs = next(c for c in dense_cases("grouped_gemm") if "gather-bias0-silu0-holes1" in c.name).make()
    x, row_token = kwargs["x"].to(dtype), kwargs["row_token"]
    dy = values(row_token.shape[0], 10, dtype=dtype)
    offsets = torch.cat((kwargs["expert_offsets"], kwargs["expert_offsets"][-1:]))  # a last expert without rows
    extra: dict[str, Any] = {"row_token": row_token} if gather else {}
    if not gather:
        x = token_rows({**kwargs, "x": x})
    fresh = ops.grouped_gemm_wgrad(dy, x, offsets, out_dtype=F32, **extra)
    assert (fresh[-1] == 0).all()
    start = values(*fresh.shape, seed=7)
    out = start.clone()
    assert ops.grouped_gemm_wgrad(dy, x, offsets, out=out, accumulate=True, **extra) is out
    assert same_bits(out, start + fresh) and same_bits(out[-1], start[-1])
    out = torch.full_like(start, NAN)
    ops.grouped_gemm_wgrad(dy, x, offsets, out=out, **extra)
    assert same_bits(out, fresh)


# --- values
# -----------------------------------------------------------------------------------------------------


def forward_exact(kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact pre-activations [R, N] and the bound of the fp32 accumulators."""
    plain = {k: v for k, v in kwargs.items() if k not in ("silu_mul", "inverse", "out_dtype")}
    exact = reference.grouped_gemm(**plain, exact=True)
    rows, bound = token_rows(kwargs), torch.zeros_like(exact)
    for e, span in enumerate(spans(kwargs["expert_offsets"])):
        bound[span] = gemm_bound(rows[span], kwargs["w"][e])
        if "bias" in kwargs:
            bound[span] += U32 * exact[span].abs() + TINY
    return exact, bound


def silu_exact(pre: torch.Tensor, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up and its bound: |silu'| <= 1.1."""
    gate, up = pre.chunk(2, 1)
    e_gate, e_up = error.chunk(2, 1)
    silu = gate * torch.sigmoid(gate)
    y = silu * up
    bound = 1.1 * e_gate * (up.abs() + e_up) + silu.abs() * e_up + SILU_UNITS * U32 * y.abs()
    return y, bound + TINY * (1 + up.abs())


# Left out: products of two large factors overflow fp32 in the epilogue; denormal inputs count as zero.
@pytest.mark.parametrize(
    "case",
    [
        c
        for n in ("grouped_gemm", "linear")
        for c in dense_cases(n, wild=False)
        if "spread-silu1" not in c.name and "denormal" not in c.name
    ],
    ids=str,
)
def test_forward_against_the_oracle(case: Case) -> None:
    kwargs = as_grouped(case.make())
    got = getattr(ops, case.op)(**case.make())
    dtype = kwargs.get("out_dtype", kwargs["x"].dtype)
    assert got.dtype == dtype
    exact, bound = forward_exact(kwargs)
    if kwargs.get("silu_mul"):
        exact, bound = silu_exact(exact, bound)
    got = got.reshape(exact.shape)
    for span in spans(kwargs["expert_offsets"]):  # per expert: an error names the expert's rows
        bounds = bound[span] * (1 + UNIT[dtype]) + rounding(exact[span], dtype)
        assert_within(got[span], exact[span], bounds, f"rows {span.start}:{span.stop}")
    assert (got[int(kwargs["expert_offsets"][-1]) :] == 0).all()


@pytest.mark.parametrize("name", ["grouped_gemm_dgrad", "grouped_gemm_wgrad"])
def test_gradient_ops_against_the_oracle(name: str) -> None:
    for case in dense_cases(name, wild=False):
        kwargs = case.make()
        exact = getattr(reference, name)(**kwargs, exact=True)
        other = "w" if name.endswith("dgrad") else "x"
        sizes = {**kwargs, "dy": kwargs["dy"].abs(), other: kwargs[other].abs()}
        depth = kwargs["dy"].shape[1] if name.endswith("dgrad") else kwargs["dy"].shape[0]
        bound = gemm_unit(depth) * getattr(reference, name)(**sizes, exact=True) + depth * TINY
        dtype = kwargs.get("out_dtype", kwargs["dy"].dtype)
        assert_within(getattr(ops, name)(**kwargs), exact, bound + rounding(exact, dtype), str(case))


def gradients_exact(kwargs: dict[str, Any], dy: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Exact gradients of x, w, bias and their bounds. The gradient that enters the products carries the error
    of its own rounding to the model dtype; with silu_mul also that of the pre-activations, which are kept in
    that dtype.
    """
    x, w = kwargs["x"].to(F64), kwargs["w"].to(F64)
    dtype, rows = kwargs["x"].dtype, token_rows(kwargs).to(F64)
    u, dy = UNIT[dtype], dy.to(F64)
    dz, e_dz = dy, u * dy.abs()
    if kwargs.get("silu_mul"):
        pre, e_pre = forward_exact(kwargs)
        e_pre = e_pre + u * (pre.abs() + e_pre) + TINY
        gate, up = pre.chunk(2, 1)
        e_gate, e_up = e_pre.chunk(2, 1)
        s = torch.sigmoid(gate)
        slope = s * (1 + gate * (1 - s))
        dy, e_dy = dy, u * dy.abs()
        dz = torch.cat((dy * up * slope, dy * gate * s), 1)
        moved = torch.cat(
            (
                dy.abs() * (e_up * slope.abs() + 0.5 * e_gate * (up.abs() + e_up)) + e_dy * (up * slope).abs(),
                dy.abs() * 1.1 * e_gate + e_dy * (gate * s).abs(),
            ),
            1,
        )
        e_dz = 1.1 * (moved + backward_bound(pre, dy, u)) + u * dz.abs()
    d_rows, e_rows = torch.zeros_like(rows), torch.zeros_like(rows)
    dw, e_dw = torch.zeros_like(w), torch.zeros_like(w)
    db, e_db = torch.zeros(w.shape[:2], dtype=F64), torch.zeros(w.shape[:2], dtype=F64)
    for e, span in enumerate(spans(kwargs["expert_offsets"])):
        size = dz[span].abs() + e_dz[span]
        n, N = size.shape
        d_rows[span] = dz[span] @ w[e]
        e_rows[span] = (e_dz[span] + gemm_unit(N) * size) @ w[e].abs()
        e_rows[span] += u * (d_rows[span].abs() + e_rows[span]) + N * TINY
        dw[e] = dz[span].T @ rows[span]
        e_dw[e] = (e_dz[span] + gemm_unit(n) * size).T @ rows[span].abs()
        e_dw[e] += u * (dw[e].abs() + e_dw[e]) + n * TINY
        db[e] = dz[span].sum(0)
        e_db[e] = e_dz[span].sum(0) + n * U32 * size.sum(0)
        e_db[e] += u * (db[e].abs() + e_db[e]) + TINY
    row_token = kwargs.get("row_token")
    if row_token is None:
        dx, e_dx = d_rows, e_rows
    else:
        owned = row_token >= 0
        index = row_token[owned].long()
        dx = torch.zeros_like(x).index_add(0, index, d_rows[owned])
        size = torch.zeros_like(x).index_add(0, index, d_rows[owned].abs() + e_rows[owned])
        e_dx = torch.zeros_like(x).index_add(0, index, e_rows[owned])
        e_dx = e_dx + kwargs["inverse"].shape[1] * U32 * size + u * (dx.abs() + e_dx) + TINY
    return {"x": (dx, e_dx), "w": (dw, e_dw), "bias": (db, e_db)}


@pytest.mark.parametrize(
    "case",
    [
        c
        for n in ("grouped_gemm", "linear")
        for c in dense_cases(n, wild=False)
        if c.grads and "spread" not in c.name and "denormal" not in c.name
    ],
    ids=str,
)
def test_gradients_against_the_oracle(case: Case) -> None:
    kwargs = case.make()
    grouped = as_grouped(kwargs)
    got = evaluate(ops, case)
    dy = cotangent("out", got["out"]).reshape(-1, got["out"].shape[-1])
    for name, (exact, bound) in gradients_exact(grouped, dy).items():
        if name not in case.grads:
            continue
        assert got[f"d_{name}"].dtype == kwargs[name].dtype and got[f"d_{name}"].shape == kwargs[name].shape
        assert_within(got[f"d_{name}"].reshape(exact.shape), exact, bound, name)


def test_bounds_are_exact_autograd() -> None:
    """gradients_exact is the autograd of the oracle: a slip in it would hide a slip in the op."""
    for pattern in ("gather-bias1-silu1-holes1", "5+0+3+1x24x40"):
        case = next(c for c in dense_cases("grouped_gemm") if c.name == f"fp32-{pattern}")
        kwargs = case.make()
        leaves = {n: kwargs[n].to(F64).requires_grad_() for n in case.grads}
        y = reference.grouped_gemm(**{**kwargs, **leaves}, exact=True)
        dy = cotangent("out", y)
        y.backward(dy)
        for name, (exact, _) in gradients_exact(kwargs, dy).items():
            if name in case.grads:
                torch.testing.assert_close(leaves[name].grad, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_unowned_rows_stays_out_of_every_gradient(dtype: torch.dtype) -> None:
    """Rows at and past offsets[E] belong to nobody: zero in the output, in dx, and in no expert's dw."""
    x, w = values(6, 20, dtype=dtype), values(2, 8, 20, seed=1, dtype=dtype).requires_grad_()
    offsets = torch.tensor([0, 3, 4], dtype=torch.int32)
    x[4:] = NAN
    x.requires_grad_()
    y = ops.grouped_gemm(x, w, offsets)
    assert (y[4:] == 0).all() and not y.isnan().any()
    dy = values(6, 8, seed=2, dtype=dtype)
    dy[4:] = NAN
    y.backward(dy)
    assert (x.grad[4:] == 0).all() and not x.grad.isnan().any() and not w.grad.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_in_their_row(dtype: torch.dtype) -> None:
    x, w = values(5, 40, dtype=dtype), values(1, 7, 40, seed=1, dtype=dtype)
    offsets = torch.tensor([0, 5], dtype=torch.int32)
    clean = ops.grouped_gemm(x, w, offsets)
    x[1, 39], x[3, 0] = NAN, float("inf")
    got = ops.grouped_gemm(x, w, offsets)
    assert got[1].isnan().all() and torch.equal(got[3] > 0, w[0, :, 0] > 0) and got[3].isinf().all()
    assert same_bits(got[[0, 2, 4]], clean[[0, 2, 4]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_is_one_expert(dtype: torch.dtype) -> None:
    x, w, b = values(9, 33, dtype=dtype), values(12, 33, seed=1, dtype=dtype), values(12, seed=2, dtype=dtype)
    offsets = torch.tensor([0, 9], dtype=torch.int32)
    for silu in (False, True):
        want = ops.grouped_gemm(x, w[None], offsets, bias=b[None], silu_mul=silu)
        assert same_bits(ops.linear(x, w, b, silu_mul=silu), want)
        assert same_bits(ops.linear(x.view(3, 3, 33), w, b, silu_mul=silu).flatten(0, 1), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_and_gradients_are_taken(dtype: torch.dtype) -> None:
    x, w = values(6, 40, dtype=dtype)[:, ::2], values(20, 8, seed=1, dtype=dtype).T
    leaf_x, leaf_w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = ops.linear(leaf_x, leaf_w)
    assert same_bits(y, ops.linear(x.contiguous(), w.contiguous()))
    y.sum().backward()
    ones = torch.ones(6, 8, dtype=dtype)
    one = torch.tensor([0, 6], dtype=torch.int32)
    assert same_bits(leaf_x.grad, ops.grouped_gemm_dgrad(ones, w.contiguous()[None], one))
    assert same_bits(leaf_w.grad, ops.grouped_gemm_wgrad(ones, x.contiguous(), one)[0])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(4, 8, dtype=torch.float64)}, "x"),
    ({"x": torch.zeros(4, 9)}, "w"),
    ({"x": torch.zeros(4, 8, dtype=BF16)}, "w"),
    ({"w": torch.zeros(6, 8)}, "w"),
    ({"w": torch.zeros(2, 6, 8, dtype=BF16)}, "w"),
    ({"expert_offsets": torch.tensor([0, 2, 4])}, "offsets"),
    ({"expert_offsets": torch.tensor([0, 4], dtype=torch.int32)}, "offsets"),
    ({"expert_offsets": torch.tensor([0, 3, 2], dtype=torch.int32)}, "offsets"),
    ({"expert_offsets": torch.tensor([1, 2, 4], dtype=torch.int32)}, "offsets"),
    ({"expert_offsets": torch.tensor([0, 2, 5], dtype=torch.int32)}, "offsets"),
    ({"row_token": torch.tensor([0, 1, 2, 4], dtype=torch.int32)}, "row_token"),
    ({"row_token": torch.tensor([0, 1, -1, 3], dtype=torch.int32)}, "row_token"),
    ({"row_token": torch.tensor([0, 1, 2, 3])}, "row_token"),
    ({"bias": torch.zeros(6)}, "bias"),
    ({"bias": torch.zeros(2, 6, dtype=BF16)}, "bias"),
    ({"out_dtype": BF16}, "out_dtype"),
    ({"out_dtype": torch.float16}, "out_dtype"),
    ({"w": torch.zeros(2, 5, 8), "silu_mul": True}, "silu_mul|w|N"),
]


@pytest.mark.parametrize(("change", "name"), BAD)
def test_bad_arguments_are_refused(change: dict[str, Any], name: str) -> None:
    good = {
        "x": torch.zeros(4, 8),
        "w": torch.zeros(2, 6, 8),
        "expert_offsets": torch.tensor([0, 2, 4], dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=name):
        ops.grouped_gemm(**{**good, **change})


def test_bad_arguments_of_the_others_are_refused() -> None:
    x, w, offsets = torch.zeros(4, 8), torch.zeros(2, 6, 8), torch.tensor([0, 2, 4], dtype=torch.int32)
    dy = torch.zeros(4, 6)
    with pytest.raises(ValueError, match="inverse"):
        ops.grouped_gemm(x.requires_grad_(), w, offsets, row_token=torch.tensor([0, 1, 2, 3], dtype=torch.int32))
    with pytest.raises(ValueError, match="dy|w"):
        ops.grouped_gemm_dgrad(torch.zeros(4, 5), w, offsets)
    with pytest.raises(ValueError, match="out"):
        ops.grouped_gemm_wgrad(dy, x.detach(), offsets, accumulate=True)
    with pytest.raises(ValueError, match="accumulate|out|dw"):
        ops.grouped_gemm_wgrad(dy, x.detach(), offsets, accumulate=True, out=torch.zeros(2, 6, 8, dtype=BF16))
    with pytest.raises(ValueError, match="out|dw"):
        ops.grouped_gemm_wgrad(dy, x.detach(), offsets, out=torch.zeros(2, 6, 7))
    with pytest.raises(ValueError, match="w"):
        ops.linear(x.detach(), torch.zeros(6, 7))
    with pytest.raises(ValueError, match="bias"):
        ops.linear(x.detach(), torch.zeros(6, 8), torch.zeros(5))
