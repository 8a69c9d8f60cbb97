"""lm_head_logprob: values and gradients against the fp64 oracle, the top n against the emulated logits; X2; errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmx import ops, reference
from glmx.reference.gemm_tree import gemm_tree
from glmx.reference.route_topk import first_k
from tests.ops.cases import BF16, DTYPES, NAN, Case, cases, ids, same_bits, values
from tests.ops.checks import F64, TINY, U32, UNIT, assert_within, gemm_bound, gemm_unit
from tests.ops.properties import check_rows_stand_alone

CHUNK = 1024
EXP_UNITS = 3  # exp within 1.5 ulp


def full(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"temperature": 1.0, "top_n": 0, **kwargs}


def exact_logits(kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tempered logits [T, V] and the bound of their fp32 form: the tree, then 1 / temperature in fp32 (2 units) and
    *.
    """
    z = kwargs["hidden"].to(F64) @ kwargs["weight"].to(F64).T / kwargs["temperature"]
    return z, gemm_bound(kwargs["hidden"], kwargs["weight"]) / kwargs["temperature"] + 3.1 * U32 * z.abs() + TINY


def lse_bound(z: torch.Tensor, e_z: torch.Tensor) -> torch.Tensor:
    """log-sum-exp moves by at most its largest logit's error; the sum is positive, so its error is relative: exp, the
    rounding of z - max, 64 additions in a lane and 4 folds, one rescaling per chunk."""
    V = z.shape[1]
    shift = (torch.softmax(z, 1) * (z.amax(1, keepdim=True) - z)).sum(1)
    return e_z.amax(1) + U32 * (EXP_UNITS + shift + 68 + (EXP_UNITS + 2) * -(-V // CHUNK))


@pytest.mark.parametrize("case", cases("lm_head_logprob", wild=False), ids=str)
def test_values_against_the_oracle(case: Case) -> None:
    kwargs = full(case.make())
    got, exact = ops.lm_head_logprob(**kwargs), reference.lm_head_logprob(**kwargs, exact=True)
    if not kwargs["ids"].numel():
        assert [t.numel() for t in got] == [0, 0, 0, 0]
        return
    z, e_z = exact_logits(kwargs)
    e_lse = lse_bound(z, e_z)
    chosen = e_z.gather(1, kwargs["ids"].clamp(min=0)[:, None])[:, 0]
    assert_within(got.lse, exact.lse, e_lse + U32 * exact.lse.abs() * 1.01, "lse")
    bound = torch.where(kwargs["ids"] < 0, 0.0, chosen + e_lse + 2 * U32 * exact.logprob.abs())
    assert_within(got.logprob, exact.logprob, bound, "logprob")
    n = kwargs["top_n"]
    picked = got.top_ids.long()
    want = z.gather(1, picked) - exact.lse[:, None]
    bound = e_z.gather(1, picked) + e_lse[:, None] + 2 * U32 * want.abs()
    assert_within(got.top_logprobs, want, bound, "top_logprobs")
    assert got.top_ids.shape == (len(z), n) and got.top_ids.dtype == torch.int32


@pytest.mark.parametrize("case", [c for c in cases("lm_head_logprob") if "257x" not in c.name], ids=str)
def test_top_is_the_total_order_of_the_emulated_logits(case: Case) -> None:
    kwargs = full(case.make())
    inverse = torch.tensor(1.0) / torch.tensor(kwargs["temperature"], dtype=torch.float32)
    z = gemm_tree(kwargs["hidden"], kwargs["weight"]) * inverse
    assert torch.equal(ops.lm_head_logprob(**kwargs).top_ids.long(), first_k(z, kwargs["top_n"]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lower_id(dtype: torch.dtype) -> None:
    weight = values(7, 8, seed=1, dtype=dtype).repeat(300, 1)
    got = ops.lm_head_logprob(values(3, 8, dtype=dtype), weight, torch.tensor([2099, 0, 7]), top_n=5)
    best = got.top_ids[:, :1]
    assert (best < 7).all() and torch.equal(got.top_ids, best + 7 * torch.arange(5, dtype=torch.int32))


def test_a_nan_logit_counts_as_minus_infinity_in_the_top() -> None:
    weight = torch.tensor([[NAN], [1.0], [NAN], [3.0], [2.0]])
    for n, want in ((2, [3, 4]), (5, [3, 4, 1, 0, 2])):
        assert ops.lm_head_logprob(torch.ones(1, 1), weight, torch.tensor([1]), top_n=n).top_ids.tolist() == [want]


def test_a_long_top_in_any_order_of_arrival() -> None:
    """Ascending logits: each column goes to the front of a list that is longer than a team has lanes."""
    weight = torch.arange(1200.0)[:, None] / 100
    weight[600:] = weight[600:].flip(0)
    got = ops.lm_head_logprob(torch.ones(1, 1), weight, torch.tensor([0]), top_n=70)
    assert torch.equal(got.top_ids.long(), first_k(weight.T.contiguous(), 70))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_many_tokens_are_those_of_few(dtype: torch.dtype) -> None:
    """More tokens than a block of the backward, every third without a gradient: no token sees the others."""
    hidden, weight = values(3100, 8, dtype=dtype), values(40, 8, seed=1, dtype=dtype)
    tokens, d_logprob = ids(3100, low=-1, high=40), values(3100, seed=2)
    d_logprob[::3] = 0.0

    def gradient(rows: slice) -> torch.Tensor:
        leaf = hidden[rows].clone().requires_grad_()
        ops.lm_head_logprob(leaf, weight, tokens[rows]).logprob.backward(d_logprob[rows])
        return leaf.grad

    whole = gradient(slice(None))
    for begin in range(0, 3100, 775):
        rows = slice(begin, begin + 775)
        assert same_bits(whole[rows], gradient(rows))
    assert (whole[::3] == 0).all() and (whole[1::3] != 0).any()


def test_all_logits_equal() -> None:
    got = ops.lm_head_logprob(torch.zeros(2, 4), torch.ones(3000, 4), torch.tensor([0, 2999]), top_n=3)
    want = torch.full((2,), 3000.0).log()
    torch.testing.assert_close(got.lse, want)
    torch.testing.assert_close(got.logprob, -want)
    assert got.top_ids.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("use", ["logprob", "lse", "both"])
@pytest.mark.parametrize("case", [c for c in cases("lm_head_logprob", wild=False) if c.grads], ids=str)
def test_gradients_against_the_oracle(case: Case, use: str) -> None:
    kwargs = full(case.make())
    T, V = kwargs["hidden"].shape[0], kwargs["weight"].shape[0]
    dtype = kwargs["hidden"].dtype
    u = UNIT[dtype]
    scale = {"logprob": (1.0, 0.0), "lse": (0.0, 1.0), "both": (1.0, 0.5)}[use]
    d_logprob, d_lse = values(T, seed=5) * scale[0], values(T, seed=6) * scale[1]

    def run(function: Any, leaves: dict[str, torch.Tensor], **extra: Any) -> Any:
        got = function(**{**kwargs, **leaves}, **extra)
        terms = [(got.logprob, d_logprob), (got.lse, d_lse)]
        terms = {"logprob": terms[:1], "lse": terms[1:], "both": terms}[use]
        torch.autograd.backward([t for t, _ in terms], [d.to(t.dtype) for t, d in terms])
        return got

    got = {n: kwargs[n].clone().requires_grad_() for n in case.grads}
    run(ops.lm_head_logprob, got)
    exact = {n: kwargs[n].to(F64).requires_grad_() for n in case.grads}
    run(reference.lm_head_logprob, exact, exact=True)
    for name in case.grads:
        assert got[name].grad.dtype == dtype
    if T == 0:
        assert (got["weight"].grad == 0).all()
        return
    z, e_z = exact_logits(kwargs)
    lse = torch.logsumexp(z, 1, keepdim=True)
    p = torch.exp(z - lse)
    # The backward recomputes e^(z - lse) from the rounded lse.
    moved = e_z + lse_bound(z, e_z)[:, None] + 2 * U32 * (z.abs() + lse.abs()) + (EXP_UNITS + 6) * U32
    named = (kwargs["ids"] >= 0)[:, None]
    d_lp = d_logprob.to(F64)[:, None] * named
    own = torch.zeros_like(z).scatter_(1, kwargs["ids"].clamp(min=0)[:, None], 1.0) * named
    inverse = 1 / kwargs["temperature"]
    dz = (d_lp * (own - p) + d_lse.to(F64)[:, None] * p) * inverse
    size = d_lp.abs() + d_lse.to(F64).abs()[:, None]
    e_dz = inverse * size * (p * torch.expm1(moved) + own * 4 * U32) + (u + 4 * U32) * dz.abs() + TINY
    chunks, blocks = -(-V // CHUNK), -(-T // 256)
    hidden, weight = (kwargs[n].to(F64).abs() for n in ("hidden", "weight"))
    e_hidden = (e_dz + (gemm_unit(min(V, CHUNK)) + chunks * U32) * (dz.abs() + e_dz)) @ weight
    e_weight = (e_dz + (gemm_unit(min(T, 256)) + blocks * U32) * (dz.abs() + e_dz)).T @ hidden
    for name, error in (("hidden", e_hidden), ("weight", e_weight)):
        grad = exact[name].grad
        assert_within(got[name].grad, grad, error * 1.01 + u * grad.abs() + V * TINY, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_tokens_have_neither_value_nor_gradient(dtype: torch.dtype) -> None:
    hidden, weight = values(4, 10, dtype=dtype), values(20, 10, seed=1, dtype=dtype).requires_grad_()
    tokens = torch.tensor([3, -1, 19, -1])
    hidden[1] = NAN
    hidden.requires_grad_()
    got = ops.lm_head_logprob(hidden, weight, tokens)
    assert (got.logprob[[1, 3]] == 0).all() and got.lse[1].isnan()
    got.logprob.backward(torch.tensor([1.0, NAN, 1.0, 1.0]))
    assert (hidden.grad[[1, 3]] == 0).all() and (hidden.grad[[0, 2]] != 0).any() and weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_with_its_token(dtype: torch.dtype) -> None:
    hidden, weight, tokens = values(3, 10, dtype=dtype), values(20, 10, seed=1, dtype=dtype), torch.tensor([0, 5, 9])
    clean = ops.lm_head_logprob(hidden, weight, tokens, top_n=2)
    hidden[1, 4] = NAN
    got = ops.lm_head_logprob(hidden, weight, tokens, top_n=2)
    assert got.logprob[1].isnan() and got.lse[1].isnan()
    for a, b in zip(got, clean, strict=True):
        assert same_bits(a[[0, 2]], b[[0, 2]])


@given(st.integers(1, 9), st.integers(1, 60), st.integers(1, 20), st.integers(0, 999), st.sampled_from(DTYPES))
@settings(max_examples=25, deadline=None)
def test_x2_a_token_does_not_see_the_others(T: int, V: int, H: int, seed: int, dtype: torch.dtype) -> None:
    weight = values(V, H, seed=seed, dtype=dtype)
    rows = {"hidden": values(T, H, seed=seed + 1, dtype=dtype), "ids": ids(T, low=-1, high=V, seed=seed)}
    check_rows_stand_alone(
        lambda hidden, ids: ops.lm_head_logprob(hidden, weight, ids, temperature=0.9, top_n=min(2, V)),
        rows,
        seed,
        ("hidden",),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_x2_over_blocks_of_tokens_and_chunks_of_the_vocabulary(dtype: torch.dtype) -> None:
    """A token alone and among more than 256 others; the vocabulary is longer than two chunks."""
    hidden, weight = values(300, 12, dtype=dtype), values(2100, 12, seed=1, dtype=dtype)
    rows = {"hidden": hidden, "ids": ids(300, high=2100)}
    call = lambda hidden, ids: ops.lm_head_logprob(hidden, weight, ids, top_n=3)
    check_rows_stand_alone(call, rows, 0, ("hidden",))
    full_batch = call(**rows)
    for t in (0, 255, 299):
        alone = call(hidden[t : t + 1], rows["ids"][t : t + 1])
        for a, b in zip(alone, full_batch, strict=True):
            assert same_bits(a[0], b[t])


@pytest.mark.parametrize("dtype", DTYPES)
def test_main_grad(dtype: torch.dtype) -> None:
    hidden, weight, tokens = values(9, 10, dtype=dtype), values(30, 10, seed=1, dtype=dtype), ids(9, high=30)
    plain = weight.clone().requires_grad_()
    ops.lm_head_logprob(hidden, plain, tokens).logprob.sum().backward()
    weight.requires_grad_()
    weight.main_grad = torch.zeros(30, 10)
    ops.lm_head_logprob(hidden, weight, tokens).logprob.sum().backward()
    assert weight.grad is None and same_bits(weight.main_grad.to(dtype), plain.grad)
    once = weight.main_grad.clone()
    ops.lm_head_logprob(hidden, weight, tokens).logprob.sum().backward()
    assert same_bits(weight.main_grad, once + once)
    nothing = weight.main_grad.clone()
    ops.lm_head_logprob(hidden, weight, torch.full((9,), -1)).logprob.sum().backward()
    assert same_bits(weight.main_grad, nothing)


def test_no_buffer_of_tokens_by_vocabulary() -> None:
    """512 tokens by 40,000 ids would be 80 MB of logits; forward and backward together allocate far less."""
    from torch.profiler import ProfilerActivity, profile

    hidden, weight = values(512, 4).requires_grad_(), values(40_000, 4, seed=1).requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        ops.lm_head_logprob(hidden, weight, ids(512, high=40_000)).logprob.sum().backward()
    largest = max(event.cpu_memory_usage for event in prof.events())
    assert 0 < largest < 30e6, largest


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"hidden": torch.zeros(3, 4, dtype=torch.float16)}, "hidden"),
        ({"hidden": torch.zeros(12)}, "hidden"),
        ({"weight": torch.zeros(5, 3)}, "weight"),
        ({"weight": torch.zeros(5, 4, dtype=BF16)}, "weight"),
        ({"ids": torch.zeros(3, dtype=torch.int32)}, "ids"),
        ({"ids": torch.zeros(2, dtype=torch.int64)}, "ids"),
        ({"ids": torch.tensor([0, 5, 0])}, "ids"),
        ({"ids": torch.tensor([0, -2, 0])}, "ids"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": NAN}, "temperature"),
        ({"top_n": 6}, "top_n"),
        ({"top_n": -1}, "top_n"),
    ],
)
def test_bad_arguments_are_refused(change: dict, name: str) -> None:
    good = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "ids": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=name):
        ops.lm_head_logprob(**{**good, **change})
