"""moe_combine: bits against the emulated FMA chain, gradients against the fp64 oracle; X2; errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmx import ops, reference
from glmx.reference.gemm_tree import flush32, fma32
from tests.ops.cases import BF16, DTYPES, NAN, Case, cases, cotangent, evaluate, same_bits, topk_ids, values, with_grad
from tests.ops.checks import F64, TINY, U32, assert_within, rounding


def fma_chain(rows: torch.Tensor, weights: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """The contract bit for bit: fused multiply-adds from +0 in the order of k, denormals flushed, one
    rounding.
    """
    total = torch.zeros(inverse.shape[0], rows.shape[1], dtype=F64)
    rows64, weights64 = flush32(rows.to(F64)), flush32(weights.to(F64))
    for t in range(inverse.shape[0]):
        for k, r in enumerate(inverse[t].tolist()):
            if r >= 0:
                total[t] = fma32(weights64[t, k].expand_as(total[t]), rows64[r], total[t])
    return total.to(rows.dtype)


@pytest.mark.parametrize("case", cases("moe_combine"), ids=str)
def test_forward_has_the_bits_of_the_fma_chain(case: Case) -> None:
    kwargs = case.make()
    got = ops.moe_combine(**kwargs)
    want = fma_chain(*(kwargs[n] for n in ("rows", "topk_weights", "inverse")))
    assert same_bits(got, want)


@pytest.mark.parametrize("case", cases("moe_combine", wild=False), ids=str)
def test_against_the_oracle_with_gradients(case: Case) -> None:
    kwargs = case.make()
    K, H = kwargs["inverse"].shape[1], kwargs["rows"].shape[1]
    dtype = kwargs["rows"].dtype
    got = evaluate(ops, case)
    exact = with_grad(kwargs, case.grads, F64)
    out = reference.moe_combine(**exact, exact=True)
    sizes = reference.moe_combine(kwargs["rows"].abs(), kwargs["topk_weights"].abs(), kwargs["inverse"], exact=True)
    assert_within(got["out"], out, K * U32 * sizes + rounding(out, dtype) + K * TINY)
    dy = cotangent("out", got["out"])
    out.backward(dy.to(F64))
    assert_within(got["d_rows"], exact["rows"].grad, rounding(exact["rows"].grad, dtype), "rows")
    rows = kwargs["rows"].to(F64)[kwargs["inverse"].long().clamp(min=0)] if kwargs["rows"].numel() else None
    if rows is not None:
        dot_sizes = (rows.abs() * dy.to(F64).abs()[:, None]).sum(-1)
        assert_within(
            got["d_topk_weights"], exact["topk_weights"].grad, (H / 16 + 5) * U32 * dot_sizes + H * TINY, "topk_weights"
        )
    unnamed = torch.ones(kwargs["rows"].shape[0], dtype=torch.bool)
    unnamed[kwargs["inverse"][kwargs["inverse"] >= 0].long()] = False
    assert (got["d_rows"][unnamed] == 0).all() and (got["d_topk_weights"][kwargs["inverse"] < 0] == 0).all()


def test_skipped_pairs_do_not_spread_nan() -> None:
    rows, weights = torch.full((2, 5), NAN), torch.full((1, 2), NAN)
    inverse = torch.tensor([[-1, -1]], dtype=torch.int32)
    assert same_bits(ops.moe_combine(rows, weights, inverse), torch.zeros(1, 5))


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 40), st.integers(0, 999), st.sampled_from(DTYPES))
@settings(max_examples=30, deadline=None)
def test_x2_a_token_does_not_see_the_others(T: int, K: int, H: int, seed: int, dtype: torch.dtype) -> None:
    """The rows of a token in another batch lie elsewhere; the token's sum must not notice."""
    E = 6
    ids = topk_ids(T, K, E, seed=seed, holes=True)
    expert_rows = values(T, K, H, seed=seed, dtype=dtype)
    weights = values(T, K, seed=seed + 1)

    def combined(tokens: torch.Tensor) -> torch.Tensor:
        plan = reference.expert_plan(ids[tokens], E)
        rows = torch.zeros(len(tokens) * K, H, dtype=dtype)
        placed = plan.inverse >= 0
        rows[plan.inverse[placed].long()] = expert_rows[tokens][placed]
        return ops.moe_combine(rows, weights[tokens], plan.inverse)

    full = combined(torch.arange(T))
    order = torch.randperm(T, generator=torch.Generator().manual_seed(seed))[: max(1, T - 2)]
    assert same_bits(combined(order), full[order])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"rows": torch.zeros(6, 4, dtype=torch.float64)}, "rows"),
        ({"rows": torch.zeros(24)}, "rows"),
        ({"topk_weights": torch.zeros(3, 3)}, "topk_weights"),
        ({"topk_weights": torch.zeros(3, 2, dtype=BF16)}, "topk_weights"),
        ({"inverse": torch.zeros(3, 2, dtype=torch.int64)}, "inverse"),
        ({"inverse": torch.full((3, 2), 6, dtype=torch.int32)}, "inverse"),
        ({"inverse": torch.full((3, 2), -2, dtype=torch.int32)}, "inverse"),
    ],
)
def test_bad_arguments_are_refused(change: dict, name: str) -> None:
    good = {
        "rows": torch.zeros(6, 4),
        "topk_weights": torch.zeros(3, 2),
        "inverse": torch.arange(6, dtype=torch.int32).view(3, 2),
    }
    with pytest.raises(ValueError, match=name):
        ops.moe_combine(**{**good, **change})
