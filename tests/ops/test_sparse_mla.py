"""sparse_mla: values and gradients against the fp64 oracle; a list of all keys is attention to the bit; X2; errors."""

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
    F32,
    INF,
    NAN,
    Case,
    attention_operands,
    cases,
    cotangent,
    mla_operands,
    offsets_of,
    paged,
    same_bits,
    with_grad,
)
from tests.ops.checks import F64, TINY, UNIT, assert_within


def bounds_of(kwargs: dict[str, Any], d_out: torch.Tensor | None = None) -> Bounds:
    bounds, lists = kwargs["cu_seqlens_q"].tolist(), []
    for i, n in enumerate(kwargs["seq_lens"].tolist()):
        rows = key_rows(i, n, kwargs.get("cu_seqlens_k"), kwargs.get("block_table"))
        for t in range(bounds[i], bounds[i + 1]):
            listed = kwargs["topk_indices"][t]
            lists.append(rows[listed[listed >= 0].long()])
    k = kwargs["kv"][:, None]
    return Bounds(kwargs["q"], k, k[:, :, : kwargs["v_dim"]], lists, kwargs["scale"], d_out)


@pytest.mark.parametrize("case", cases("sparse_mla", wild=False), ids=str)
def test_values_against_the_oracle(case: Case) -> None:
    kwargs = {**case.make(), "return_lse": True}
    got, exact = ops.sparse_mla(**kwargs), reference.sparse_mla(**kwargs, exact=True)
    bounds = bounds_of(kwargs)
    assert got.out.dtype == kwargs["q"].dtype and got.lse.dtype == torch.float32
    assert_within(got.out, exact.out, bounds.out, "out")
    assert_within(got.lse, exact.lse, bounds.lse, "lse")


@pytest.mark.parametrize("case", [c for c in cases("sparse_mla", wild=False) if c.grads], ids=str)
def test_gradients_against_the_oracle(case: Case) -> None:
    kwargs = {**case.make(), "return_lse": False}
    d_out = cotangent("out", reference.sparse_mla(**kwargs))
    got, exact = with_grad(kwargs, case.grads), with_grad(kwargs, case.grads, F64)
    ops.sparse_mla(**got).backward(d_out)
    if d_out.numel() == 0:
        assert not any(got[name].grad.any() for name in case.grads)
        return
    reference.sparse_mla(**exact, exact=True).backward(d_out.to(F64))
    bounds, u = bounds_of(kwargs, d_out), UNIT[kwargs["q"].dtype]
    errors = {"q": bounds.d_q, "kv": bounds.d_k[:, 0]}
    errors["kv"][:, : kwargs["v_dim"]] += bounds.d_v[:, 0]
    for name in case.grads:
        grad = exact[name].grad
        assert_within(got[name].grad, grad, 1.01 * errors[name] + u * 1.01 * grad.abs() + TINY, f"d_{name}")


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_list_of_all_keys_is_attention(dtype: torch.dtype, data: st.DataObject) -> None:
    q_lens = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=3), "queries")
    seq_lens = [q + data.draw(st.integers(0, 150), "cached") for q in q_lens]
    heads = data.draw(st.sampled_from([1, 4, 9]), "heads")
    Dk, Dv = data.draw(st.sampled_from([(16, 16), (40, 24), (36, 33)]), "widths")
    seed = data.draw(st.integers(0, 999), "seed")
    dense = attention_operands(q_lens, seq_lens, heads, 1, Dk, Dv, dtype, shared=True)
    sparse = mla_operands(q_lens, seq_lens, heads, Dk, Dv, 10**6, dtype)
    if data.draw(st.booleans(), "paged"):
        dense, sparse = paged(dense, seed), paged(sparse, seed)
    want = ops.attention(**{**dense, "scale": sparse["scale"], "return_lse": True})
    for a, b in zip(ops.sparse_mla(**sparse, return_lse=True), want, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_x2_a_token_stands_alone(dtype: torch.dtype, data: st.DataObject) -> None:
    """A token alone, with its list padded further, and beside others; over rows and over pages."""
    q_lens, seq_lens, seed = [3, 2], [90, 140], data.draw(st.integers(0, 999), "seed")
    kwargs = mla_operands(q_lens, seq_lens, 5, 24, 16, data.draw(st.integers(1, 100), "k"), dtype, seed=seed)
    want = ops.sparse_mla(**kwargs, return_lse=True)
    pages = paged(kwargs, seed)
    for t, (i, n) in enumerate([(0, 88), (0, 89), (0, 90), (1, 139), (1, 140)]):
        lists = torch.nn.functional.pad(kwargs["topk_indices"][t : t + 1], (0, data.draw(st.integers(0, 70))), value=-1)
        lens = torch.tensor([n], dtype=torch.int32)
        one = {"cu_seqlens_q": offsets_of([1]), "seq_lens": lens, "q": kwargs["q"][t : t + 1], "topk_indices": lists}
        got = ops.sparse_mla(**{**pages, **one, "block_table": pages["block_table"][i : i + 1]}, return_lse=True)
        for a, b in zip(got, want, strict=True):
            assert same_bits(a[0], b[t])


@pytest.mark.parametrize("dtype", DTYPES)
def test_x2_a_sequences_gradient_stands_alone(dtype: torch.dtype) -> None:
    kwargs = mla_operands([40, 9], [70, 80], 5, 24, 16, 30, dtype)
    full = with_grad(kwargs, ("q", "kv"))
    out = ops.sparse_mla(**full)
    d_out = cotangent("out", out)
    out.backward(d_out)
    for i, (q, k) in enumerate([(slice(0, 40), slice(0, 70)), (slice(40, 49), slice(70, 150))]):
        alone = with_grad({"q": kwargs["q"][q], "kv": kwargs["kv"][k]}, ("q", "kv"))
        lens = kwargs["seq_lens"][i : i + 1]
        ops.sparse_mla(
            **alone,
            topk_indices=kwargs["topk_indices"][q],
            cu_seqlens_q=offsets_of([q.stop - q.start]),
            seq_lens=lens,
            cu_seqlens_k=offsets_of(lens.tolist()),
            scale=kwargs["scale"],
            v_dim=16,
        ).backward(d_out[q])
        assert same_bits(alone["q"].grad, full["q"].grad[q]) and same_bits(alone["kv"].grad, full["kv"].grad[k])


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_that_no_list_names_are_not_read(dtype: torch.dtype) -> None:
    kwargs = mla_operands([4], [200], 5, 24, 16, 70, dtype)
    listed = torch.zeros(200, dtype=torch.bool)
    listed[kwargs["topk_indices"].long()] = True
    assert not listed.all()
    clean, dirty = with_grad(kwargs, ("q", "kv")), with_grad(kwargs, ("q", "kv"))
    with torch.no_grad():
        dirty["kv"][~listed] = NAN
    for each in (clean, dirty):
        each["out"] = ops.sparse_mla(**each)
        each["out"].sum().backward()
    assert same_bits(clean["out"], dirty["out"])
    assert same_bits(clean["q"].grad, dirty["q"].grad) and same_bits(clean["kv"].grad, dirty["kv"].grad)
    assert not clean["kv"].grad[~listed].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_list(dtype: torch.dtype) -> None:
    kwargs = with_grad(mla_operands([2], [5], 3, 8, 8, 4, dtype), ("q", "kv"))
    kwargs["topk_indices"][0] = -1
    got = ops.sparse_mla(**kwargs, return_lse=True)
    assert not got.out[0].any() and (got.lse[0] == INF).all() and got.out[1].any()
    got.out.sum().backward()
    assert not kwargs["q"].grad[0].any() and kwargs["kv"].grad.isfinite().all()


def test_many_tokens_and_ranges_of_the_cache() -> None:
    """More tokens than the workspace holds at a time (32 MB), and a cache of several ranges."""
    kwargs = mla_operands([300], [700], 3, 16, 8, 5000, F32)
    full = with_grad(kwargs, ("q", "kv"))
    out = ops.sparse_mla(**full)
    d_out = cotangent("out", out)
    out.backward(d_out)
    exact = with_grad(kwargs, ("q", "kv"), F64)
    reference.sparse_mla(**exact, exact=True).backward(d_out.double())
    for name in ("q", "kv"):
        torch.testing.assert_close(full[name].grad.double(), exact[name].grad, rtol=2e-5, atol=2e-5)


GOOD = mla_operands([1, 2], [3, 2], 4, 8, 6, 2, F32)
I32 = torch.int32


def lists(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=I32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(3, 4, 8, dtype=torch.float16)}, "q: expected dtype"),
        ({"kv": torch.zeros(5, 9)}, "kv: expected size 8"),
        ({"kv": torch.zeros(5, 8, dtype=BF16)}, "kv: expected dtype"),
        ({"kv": torch.zeros(5, 1, 8)}, "kv: expected 2 dim"),
        ({"v_dim": 9}, r"v_dim <= kv.shape\[1\] == 8: got 9"),
        ({"v_dim": 0}, "v_dim"),
        ({"scale": NAN}, "scale"),
        ({"topk_indices": torch.zeros(3, 2)}, "topk_indices: expected dtype"),
        ({"topk_indices": lists([0, 1], [0, -1])}, "topk_indices: expected size 3"),
        ({"topk_indices": lists([0, 1], [0, -1], [1, 0])}, r"ascending topk_indices, or -1: got 0 after 1 at \[2, 1\]"),
        ({"topk_indices": lists([0, 1], [0, -1], [1, 1])}, "ascending"),
        ({"topk_indices": lists([0, 1], [-2, -1], [1, -1])}, "ascending"),
        ({"topk_indices": lists([0, 1], [0, 1], [0, 1])}, "below 1, the keys that row 1 sees: got 1"),
        (
            {"topk_indices": lists([-1, 1], [0, -1], [0, 1])},
            r"-1 behind the first -1 of topk_indices: got 1 at \[0, 1\]",
        ),
        ({"cu_seqlens_k": None}, "neither"),
        ({"seq_lens": torch.tensor([4, 2], dtype=I32)}, r"seq_lens\[0\] <= 3"),
    ],
)
def test_bad_arguments_are_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ops.sparse_mla(**{**GOOD, **change})


def test_paged_keys_have_no_gradient() -> None:
    kwargs = paged(GOOD, 0)
    with pytest.raises(ValueError, match="block_table have no gradient"):
        ops.sparse_mla(**{**kwargs, "q": kwargs["q"].clone().requires_grad_()}).sum().backward()


def test_the_shape_of_glm5() -> None:
    kwargs = mla_operands([2], [300], 64, 576, 512, 200, BF16)
    exact = reference.sparse_mla(**kwargs, exact=True)
    assert_within(ops.sparse_mla(**kwargs), exact, bounds_of(kwargs).out)
