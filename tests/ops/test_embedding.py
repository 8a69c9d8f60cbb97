"""embedding: copies, and a gradient whose bits are a fp32 sum in token order; main_grad; X2; errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmx import ops, reference
from glmx.reference.gemm_tree import flush32, round32_sum
from tests.ops.cases import BF16, DTYPES, NAN, Case, cases, cotangent, evaluate, ids, same_bits, values, with_grad
from tests.ops.checks import F64, TINY, U32, assert_within, rounding
from tests.ops.properties import check_rows_stand_alone


def sum_in_token_order(tokens: torch.Tensor, dy: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """fp32 [V, H] by the contract, one rounded addition per token."""
    out, dy64 = flush32(start.to(F64)), flush32(dy.to(F64))
    for t, v in enumerate(tokens.tolist()):
        out[v] = round32_sum(out[v], dy64[t])
    return out.float()


@pytest.mark.parametrize("case", cases("embedding"), ids=str)
def test_forward_copies_bits(case: Case) -> None:
    """A denormal or a NaN in a row passes unchanged: nothing is computed."""
    kwargs = case.make()
    got = ops.embedding(**kwargs)
    ints = {2: torch.int16, 4: torch.int32}[got.element_size()]
    assert torch.equal(got.view(ints), kwargs["weight"][kwargs["ids"]].view(ints))


@pytest.mark.parametrize("case", cases("embedding"), ids=str)
def test_gradient_has_the_bits_of_the_sum_in_token_order(case: Case) -> None:
    kwargs = case.make()
    got = evaluate(ops, case)
    weight = kwargs["weight"]
    want = sum_in_token_order(kwargs["ids"], cotangent("out", got["out"]), torch.zeros(weight.shape))
    assert same_bits(got["d_weight"], want.to(weight.dtype))


@pytest.mark.parametrize("case", cases("embedding", wild=False), ids=str)
def test_gradient_against_the_oracle(case: Case) -> None:
    kwargs = case.make()
    got = evaluate(ops, case)
    exact = with_grad(kwargs, ("weight",), F64)
    out = reference.embedding(**exact, exact=True)
    dy = cotangent("out", got["out"]).to(F64)
    out.backward(dy)
    count = torch.bincount(kwargs["ids"], minlength=kwargs["weight"].shape[0])[:, None]
    sizes = torch.zeros_like(exact["weight"].detach()).index_add(0, kwargs["ids"], dy.abs())
    grad = exact["weight"].grad
    assert_within(got["d_weight"], grad, count * U32 * sizes + rounding(grad, kwargs["weight"].dtype) + TINY)


@pytest.mark.parametrize("dtype", DTYPES)
def test_main_grad_is_added_to_token_by_token(dtype: torch.dtype) -> None:
    tokens, weight = ids(40, high=7), values(9, 20, dtype=dtype).requires_grad_()
    dy = values(40, 20, seed=1, dtype=dtype)
    start = values(9, 20, seed=2)
    weight.main_grad = start.clone()
    ops.embedding(tokens, weight).backward(dy)
    assert weight.grad is None
    assert same_bits(weight.main_grad, sum_in_token_order(tokens, dy, start))
    assert same_bits(weight.main_grad[7:], start[7:])  # rows that no token names


def test_rows_without_tokens_have_zero_gradients() -> None:
    weight = values(6, 5).requires_grad_()
    ops.embedding(torch.tensor([4, 4]), weight).sum().backward()
    assert (weight.grad[[0, 1, 2, 3, 5]] == 0).all() and (weight.grad[4] == 2).all()


def test_a_nan_gradient_stays_in_its_row() -> None:
    weight = values(4, 3).requires_grad_()
    dy = torch.ones(3, 3)
    dy[1] = NAN
    ops.embedding(torch.tensor([0, 2, 0]), weight).backward(dy)
    assert weight.grad[2].isnan().all() and not weight.grad[[0, 1, 3]].isnan().any()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_tokens_and_threads(threads: int, restore_threads: None) -> None:
    torch.set_num_threads(threads)
    tokens, weight = ids(3000, high=50), values(50, 24).requires_grad_()
    dy = values(3000, 24, seed=1)
    ops.embedding(tokens, weight).backward(dy)
    assert same_bits(weight.grad, sum_in_token_order(tokens, dy, torch.zeros(50, 24)))


@given(st.integers(1, 20), st.integers(1, 40), st.integers(0, 999), st.sampled_from(DTYPES))
@settings(max_examples=20, deadline=None)
def test_x2_a_token_does_not_see_the_others(T: int, H: int, seed: int, dtype: torch.dtype) -> None:
    weight = values(6, H, seed=seed, dtype=dtype)
    check_rows_stand_alone(lambda ids: ops.embedding(ids, weight), {"ids": ids(T, high=6, seed=seed)}, seed)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"ids": torch.zeros(3, dtype=torch.int32)}, "ids"),
        ({"ids": torch.zeros(3, 1, dtype=torch.int64)}, "ids"),
        ({"ids": torch.tensor([0, 5])}, "ids"),
        ({"ids": torch.tensor([-1])}, "ids"),
        ({"weight": torch.zeros(5)}, "weight"),
        ({"weight": torch.zeros(5, 4, dtype=torch.float16)}, "weight"),
    ],
)
def test_bad_arguments_are_refused(change: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ops.embedding(**{"ids": torch.zeros(3, dtype=torch.int64), "weight": torch.zeros(5, 4, dtype=BF16), **change})
