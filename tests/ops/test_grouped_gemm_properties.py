"""grouped_gemm's X2 (a row sees neither the other rows nor their number) and main_grad."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmx import ops, reference
from tests.ops.cases import DTYPES, F32, offsets_of, same_bits, topk_ids, values
from tests.ops.properties import check_rows_stand_alone

E = 4


@given(
    st.integers(1, 24),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 80),
    st.integers(0, 999),
    st.sampled_from(DTYPES),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_x2_of_a_whole_expert_layer(
    T: int, top_k: int, half_N: int, K: int, seed: int, dtype: torch.dtype, silu: bool
) -> None:
    """plan, gather, GEMM, combine and their backward: a token's output and dx do not see the other tokens."""
    w = values(E, 2 * half_N, K, seed=seed, dtype=dtype)
    b = values(E, 2 * half_N, seed=seed + 1, dtype=dtype)

    def layer(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        plan = ops.expert_plan(ids, E)
        rows = ops.grouped_gemm(
            x,
            w,
            plan.expert_offsets,
            row_token=plan.row_token,
            inverse=plan.inverse,
            bias=b,
            silu_mul=silu,
        )
        return ops.moe_combine(rows, weights, plan.inverse)

    rows = {
        "x": values(T, K, seed=seed + 2, dtype=dtype),
        "weights": values(T, top_k, seed=seed + 3),
        "ids": topk_ids(T, top_k, E, seed=seed, holes=True),
    }
    check_rows_stand_alone(layer, rows, seed, ("x", "weights"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 5, 31, 33, 300])
def test_x2_of_linear_for_every_kind_of_block(rows: int, dtype: torch.dtype) -> None:
    """One row alone, few rows and more rows than a block: other tilings, the same bits."""
    x, w = values(300, 150, dtype=dtype), values(70, 150, seed=1, dtype=dtype)
    full = ops.linear(x, w)
    for start in (0, 300 - rows):
        assert same_bits(ops.linear(x[start : start + rows], w), full[start : start + rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 15, 17, 64, 65, 257])
def test_x2_of_linear_for_every_width(columns: int, dtype: torch.dtype) -> None:
    x, w = values(7, 90, dtype=dtype), values(260, 90, seed=1, dtype=dtype)
    full = ops.linear(x, w)
    assert same_bits(ops.linear(x, w[:columns]), full[:, :columns])
    assert same_bits(ops.linear(x, w[-columns:]), full[:, -columns:])


@given(st.lists(st.integers(0, 40), min_size=2, max_size=4), st.integers(0, 999), st.sampled_from(DTYPES))
@settings(max_examples=20, deadline=None)
def test_an_expert_does_not_see_the_others(counts: list[int], seed: int, dtype: torch.dtype) -> None:
    """Forward, dgrad and wgrad of an expert's rows equal those of the expert alone."""
    R, N, K = sum(counts), 18, 35
    x, w, dy = values(R, K, seed=seed, dtype=dtype), values(len(counts), N, K, dtype=dtype), values(R, N, dtype=dtype)
    offsets = offsets_of(counts)
    y, dx, dw = ops.grouped_gemm(x, w, offsets), ops.grouped_gemm_dgrad(dy, w, offsets), None
    dw = ops.grouped_gemm_wgrad(dy, x, offsets)
    for e, n in enumerate(counts):
        span, alone = slice(int(offsets[e]), int(offsets[e + 1])), offsets_of([n])
        assert same_bits(ops.grouped_gemm(x[span], w[e : e + 1], alone), y[span])
        assert same_bits(ops.grouped_gemm_dgrad(dy[span], w[e : e + 1], alone), dx[span])
        assert same_bits(ops.grouped_gemm_wgrad(dy[span], x[span], alone)[0], dw[e])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [False, True])
def test_main_grad_of_experts(dtype: torch.dtype, silu: bool) -> None:
    plan = reference.expert_plan(topk_ids(9, 2, E), E)
    x = values(9, 20, dtype=dtype)
    w, b = values(E, 12, 20, seed=1, dtype=dtype), values(E, 12, seed=2, dtype=dtype)

    def run(main_grads: tuple[torch.Tensor, torch.Tensor] | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        if main_grads is not None:
            leaves[1].main_grad, leaves[2].main_grad = main_grads
        y = ops.grouped_gemm(
            leaves[0],
            leaves[1],
            plan.expert_offsets,
            row_token=plan.row_token,
            inverse=plan.inverse,
            bias=leaves[2],
            silu_mul=silu,
        )
        y.backward(values(*y.shape, seed=3, dtype=dtype))
        return tuple(t.grad for t in leaves)

    dx, dw, db = run(None)
    zeros = torch.zeros(E, 12, 20), torch.zeros(E, 12)
    dx_again, none_w, none_b = run(zeros)
    assert none_w is None and none_b is None and same_bits(dx_again, dx)
    assert same_bits(zeros[0].to(dtype), dw) and same_bits(zeros[1].to(dtype), db)
    started = values(E, 12, 20, seed=4), values(E, 12, seed=5)
    kept = [t.clone() for t in started]
    run(started)
    for got, start, fresh in zip(started, kept, zeros, strict=True):
        torch.testing.assert_close(got, start + fresh, rtol=1e-6, atol=1e-6)
    assert same_bits(started[0], kept[0] + zeros[0])  # wgrad: out + the finished tree, one rounding


@pytest.mark.parametrize("dtype", DTYPES)
def test_main_grad_of_a_dense_weight(dtype: torch.dtype) -> None:
    x, w, b = values(5, 20, dtype=dtype), values(12, 20, seed=1, dtype=dtype), values(12, seed=2, dtype=dtype)
    plain_w, plain_b = w.clone().requires_grad_(), b.clone().requires_grad_()
    ops.linear(x, plain_w, plain_b).backward(values(5, 12, dtype=dtype))
    w.requires_grad_(), b.requires_grad_()
    w.main_grad, b.main_grad = torch.zeros(12, 20), torch.zeros(12)
    ops.linear(x, w, b).backward(values(5, 12, dtype=dtype))
    assert w.grad is None and b.grad is None and w.main_grad.dtype == F32
    assert same_bits(w.main_grad.to(dtype), plain_w.grad) and same_bits(b.main_grad.to(dtype), plain_b.grad)
    once = w.main_grad.clone()
    ops.linear(x, w, b).backward(values(5, 12, dtype=dtype))
    assert same_bits(w.main_grad, once + once)
