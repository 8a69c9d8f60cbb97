"""attention: values and gradients against the fp64 oracle; X2 and X3 as properties; keys a row must not see; errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmx import ops, reference
from glmx.reference.attention import key_rows
from tests.ops.attention_bounds import Bounds
from tests.ops.cases import (
    BF16,
    DTYPES,
    INF,
    NAN,
    Case,
    attention_operands,
    cases,
    cotangent,
    offsets_of,
    paged,
    same_bits,
    values,
    with_grad,
)
from tests.ops.checks import F64, TINY, UNIT, assert_within


def lists_of(kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The key rows that each query row sees."""
    bounds, out = kwargs["cu_seqlens_q"].tolist(), []
    for i, n in enumerate(kwargs["seq_lens"].tolist()):
        rows = key_rows(i, n, kwargs.get("cu_seqlens_k"), kwargs.get("block_table"))
        out += [rows[: n - (bounds[i + 1] - 1 - t)] for t in range(bounds[i], bounds[i + 1])]
    return out


def bounds_of(kwargs: dict[str, Any], d_out: torch.Tensor | None = None) -> Bounds:
    v = kwargs["v"] if kwargs["v"] is not None else kwargs["k"][:, :, : kwargs["v_dim"]]
    scale = kwargs.get("scale") or kwargs["q"].shape[2] ** -0.5
    return Bounds(kwargs["q"], kwargs["k"], v, lists_of(kwargs), scale, d_out)


@pytest.mark.parametrize("case", cases("attention", wild=False), ids=str)
def test_values_against_the_oracle(case: Case) -> None:
    kwargs = {**case.make(), "return_lse": True}
    got, exact = ops.attention(**kwargs), reference.attention(**kwargs, exact=True)
    bounds = bounds_of(kwargs)
    assert got.out.dtype == kwargs["q"].dtype and got.lse.dtype == torch.float32
    assert_within(got.out, exact.out, bounds.out, "out")
    assert_within(got.lse, exact.lse, bounds.lse, "lse")


@pytest.mark.parametrize("case", [c for c in cases("attention", wild=False) if c.grads], ids=str)
def test_gradients_against_the_oracle(case: Case) -> None:
    kwargs = case.make()
    d_out = cotangent("out", reference.attention(**{**kwargs, "return_lse": False}))
    got, exact = with_grad(kwargs, case.grads), with_grad(kwargs, case.grads, F64)
    ops.attention(**{**got, "return_lse": False}).backward(d_out)
    if d_out.numel() == 0:
        assert not any(got[name].grad.any() for name in case.grads)
        return
    reference.attention(**{**exact, "return_lse": False}, exact=True).backward(d_out.to(F64))
    bounds, u = bounds_of(kwargs, d_out), UNIT[kwargs["q"].dtype]
    errors = {"q": bounds.d_q, "k": bounds.d_k, "v": bounds.d_v}
    if kwargs["v"] is None:
        errors["k"][:, :, : kwargs["v_dim"]] += bounds.d_v
    for name in case.grads:
        grad = exact[name].grad
        assert got[name].grad.dtype == kwargs["q"].dtype
        assert_within(got[name].grad, grad, 1.01 * errors[name] + u * 1.01 * grad.abs() + TINY, f"d_{name}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_that_no_sequence_owns_get_zeros(dtype: torch.dtype) -> None:
    """cu_seqlens_k may leave room behind a sequence's keys, and rows before and after."""
    q = values(3, 2, 8, dtype=dtype)
    k, v = (values(12, 1, 8, seed=s, dtype=dtype).index_fill_(0, torch.tensor([0, 5, 6, 11]), NAN) for s in (1, 2))
    k.requires_grad_(), v.requires_grad_()
    cu_k = torch.tensor([1, 7, 11], dtype=torch.int32)
    lens = torch.tensor([4, 4], dtype=torch.int32)
    out = ops.attention(q, k, v, offsets_of([1, 2]), lens, cu_seqlens_k=cu_k)
    out.sum().backward()
    for grad in (k.grad, v.grad):
        assert not grad[[0, 5, 6, 11]].any() and grad.isfinite().all() and grad[[1, 2, 7]].any()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_x3_chunks_and_pages_change_no_bits(dtype: torch.dtype, data: st.DataObject) -> None:
    """A sequence in one call, and cut anywhere into calls, contiguous or paged, beside other sequences or alone."""
    S = data.draw(st.integers(1, 200), "keys")
    heads, groups = data.draw(st.sampled_from([(1, 1), (4, 1), (6, 2), (3, 3), (12, 1)]), "heads")
    Dk, Dv = data.draw(st.sampled_from([(16, 16), (8, 24), (36, 20)]), "widths")
    seed = data.draw(st.integers(0, 999), "seed")
    shared = groups == 1 and Dk >= Dv and data.draw(st.booleans(), "latent")
    q, k = values(S, heads, Dk, seed=seed, dtype=dtype, scale=2.0), values(S, groups, Dk, seed=seed + 1, dtype=dtype)
    v = None if shared else values(S, groups, Dv, seed=seed + 2, dtype=dtype)
    whole = ops.attention(q, k, v, *[offsets_of([S]), torch.tensor([S], dtype=torch.int32)],
                          cu_seqlens_k=offsets_of([S]), v_dim=Dv, return_lse=True)  # fmt: skip
    at = 0
    while at < S:
        n = min(S - at, data.draw(st.sampled_from([1, 1, 2, 3, 5, 17, 64, 65, 100]), "piece"))
        others = data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 70)), max_size=2), "others")
        place = data.draw(st.integers(0, len(others)), "place")
        lens = [(a, a + b) for a, b in others]
        lens.insert(place, (n, at + n))
        parts = [
            (q[at : at + n], k[: at + n], None if v is None else v[: at + n])
            if i == place
            else (
                values(a, heads, Dk, seed=i, dtype=dtype),
                values(b, groups, Dk, seed=i + 9, dtype=dtype),
                None if v is None else values(b, groups, Dv, seed=i + 5, dtype=dtype),
            )  # fmt: skip
            for i, (a, b) in enumerate(lens)
        ]
        kwargs = {
            "q": torch.cat([p[0] for p in parts]),
            "k": torch.cat([p[1] for p in parts]),
            "v": None if v is None else torch.cat([p[2] for p in parts]),
            "cu_seqlens_q": offsets_of([a for a, _ in lens]),
            "seq_lens": torch.tensor([b for _, b in lens], dtype=torch.int32),
            "cu_seqlens_k": offsets_of([b for _, b in lens]),
            "v_dim": Dv,
            "return_lse": True,
        }
        if data.draw(st.booleans(), "paged"):
            kwargs = paged(kwargs, seed)
        got = ops.attention(**kwargs)
        first = int(kwargs["cu_seqlens_q"][place])
        for a, b in zip(got, whole, strict=True):
            assert same_bits(a[first : first + n], b[at : at + n]), f"rows {at} to {at + n} of {S}"
        at += n


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [NAN, INF])
def test_later_tokens_do_not_reach_back(dtype: torch.dtype, poison: float) -> None:
    kwargs = attention_operands([70], [70], 6, 2, 20, 16, dtype)
    clean = ops.attention(**kwargs)
    for name in ("k", "v"):
        dirty = {**kwargs, name: kwargs[name].clone()}
        dirty[name][41] = poison
        got = ops.attention(**dirty)
        assert same_bits(got[:41], clean[:41]) and not got[41:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_past_the_keys_are_not_read(dtype: torch.dtype) -> None:
    kwargs = paged(attention_operands([2, 1], [66, 3], 4, 2, 16, 16, dtype), 3)
    clean = ops.attention(**kwargs)
    used = torch.cat([key_rows(i, n, None, kwargs["block_table"]) for i, n in enumerate((66, 3))])
    for name in ("k", "v"):
        rest = torch.ones(kwargs[name].shape[0], dtype=torch.bool)
        rest[used] = False
        kwargs[name][rest] = NAN
    kwargs["block_table"][1, 1:] = -7  # pages past a sequence's keys are not looked at
    assert same_bits(ops.attention(**kwargs), clean)


def one_row(scores: list[float], scale: float = 1.0) -> ops.Attended:
    n = len(scores)
    k, v = torch.tensor(scores).view(n, 1, 1), torch.arange(1.0, n + 1).view(n, 1, 1)
    lens = torch.tensor([n], dtype=torch.int32)
    return ops.attention(torch.ones(1, 1, 1), k, v, offsets_of([1]), lens, cu_seqlens_k=offsets_of([n]), scale=scale,
                         return_lse=True)  # fmt: skip


def test_extreme_scores() -> None:
    assert one_row([-INF] * 64 + [2.0]).out.item() == 65.0 and one_row([-INF] * 64 + [2.0]).lse.item() == 2.0
    assert one_row([-INF] * 3).out.isnan() and one_row([-INF] * 3).lse.item() == -INF
    assert one_row([1.0, INF]).out.isnan() and one_row([1.0, NAN]).lse.isnan()
    assert one_row([0.0, 1e4]).out.item() == 2.0 and one_row([3e38, 3e38], 1.0).out.item() == 1.5
    got = one_row([-1e4] * 70 + [0.0] * 2)
    assert got.out.item() == 71.5 and abs(got.lse.item() - 0.6931472) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_x2_gradients_of_a_sequence_stand_alone(dtype: torch.dtype) -> None:
    lengths = [70, 3, 0, 64]
    kwargs = attention_operands(lengths, [75, 3, 0, 64], 6, 2, 20, 16, dtype)
    names = ("q", "k", "v")
    full = with_grad(kwargs, names)
    out = ops.attention(**full)
    d_out = cotangent("out", out)
    out.backward(d_out)
    cu_q, cu_k = kwargs["cu_seqlens_q"].tolist(), kwargs["cu_seqlens_k"].tolist()
    for i in (0, 1, 3):
        rows = {"q": slice(*cu_q[i : i + 2]), "k": slice(*cu_k[i : i + 2]), "v": slice(*cu_k[i : i + 2])}
        alone = with_grad({n: kwargs[n][rows[n]] for n in names}, names)
        lens = kwargs["seq_lens"][i : i + 1]
        got = ops.attention(
            **alone, cu_seqlens_q=offsets_of([lengths[i]]), seq_lens=lens, cu_seqlens_k=offsets_of(lens.tolist())
        )
        got.backward(d_out[rows["q"]])
        assert same_bits(got, out[rows["q"]])
        for n in names:
            assert same_bits(alone[n].grad, full[n].grad[rows[n]]), f"d_{n} of sequence {i}"


def test_paged_keys_have_no_gradient() -> None:
    kwargs = paged(attention_operands([2], [3], 2, 1, 8, 8, torch.float32), 0)
    kwargs["q"].requires_grad_()
    with pytest.raises(ValueError, match="block_table have no gradient"):
        ops.attention(**kwargs).sum().backward()


I32 = torch.int32
GOOD = attention_operands([1, 2], [3, 2], 4, 2, 8, 6, torch.float32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(3, 4, 8, dtype=torch.float16)}, "q: expected dtype"),
        ({"q": torch.zeros(3, 8)}, "q: expected 3 dim"),
        ({"q": torch.zeros(3, 5, 8)}, r"q.shape\[1\] to be a multiple of k.shape\[1\]: got 5, k has 2"),
        ({"k": torch.zeros(5, 2, 9)}, "k: expected size 8"),
        ({"k": torch.zeros(5, 2, 8, dtype=BF16)}, "k: expected dtype"),
        ({"v": torch.zeros(5, 1, 6)}, "v: expected size 2"),
        ({"v": torch.zeros(4, 2, 6)}, "v: expected size 5"),
        ({"v": None, "v_dim": None}, "v_dim"),
        ({"v": None, "v_dim": 4}, r"k.shape\[1\] == 1"),
        ({"v_dim": 5}, "v_dim"),
        ({"cu_seqlens_q": offsets_of([1, 1])}, r"cu_seqlens_q\[-1\] == 3"),
        ({"cu_seqlens_q": offsets_of([3])}, "seq_lens"),
        ({"cu_seqlens_q": offsets_of([-1, 4])}, "ascending"),
        ({"cu_seqlens_q": offsets_of([1, 2]).long()}, "cu_seqlens_q: expected dtype"),
        ({"seq_lens": torch.tensor([3, 1], dtype=I32)}, r"seq_lens\[1\] >= 2"),
        ({"seq_lens": torch.tensor([4, 2], dtype=I32)}, r"seq_lens\[0\] <= 3"),
        ({"cu_seqlens_k": None}, "neither"),
        ({"block_table": torch.zeros(2, 1, dtype=I32)}, "both"),
        ({"cu_seqlens_k": offsets_of([3, 3])}, "key rows"),
        ({"cu_seqlens_k": None, "block_table": torch.zeros(2, 1, dtype=I32)}, r"block_table\[0, 0\] in \[0, 0\)"),
        ({"cu_seqlens_k": None, "block_table": torch.zeros(2, 0, dtype=I32)}, r"block_table.shape\[1\] >= 1"),
        ({"scale": INF}, "scale"),
    ],
)
def test_bad_arguments_are_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ops.attention(**{**GOOD, **change})


def test_every_head_width_that_models_have() -> None:
    for A, G, Dk, Dv in [(12, 1, 128, 128), (4, 1, 576, 512), (2, 2, 192, 128), (3, 3, 1, 1)]:
        kwargs = attention_operands([3], [130], A, G, Dk, Dv, BF16, shared=Dk == 576)
        exact = reference.attention(**kwargs, exact=True)
        assert_within(ops.attention(**kwargs), exact, bounds_of(kwargs).out, f"{A, G, Dk, Dv}")
