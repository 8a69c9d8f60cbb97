"""indexer_kl: values and gradients against the fp64 oracle; all keys listed or not; X2; what it trains; errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmx import ops, reference
from glmx.reference.attention import key_rows
from tests.ops.cases import (
    BF16,
    DTYPES,
    F32,
    NAN,
    Case,
    cases,
    cotangent,
    indexer_kl_operands,
    offsets_of,
    same_bits,
    values,
    with_grad,
)
from tests.ops.checks import F64, TINY, U32, UNIT, assert_within
from tests.ops.indexer_kl_bounds import KlBounds

LEAVES = ("index_q", "index_weights", "index_k")
I32 = torch.int32


def lists_of(kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The rows of each token's keys."""
    bounds, lists = kwargs["cu_seqlens_q"].tolist(), []
    for i, n in enumerate(kwargs["seq_lens"].tolist()):
        rows = key_rows(i, n, kwargs["cu_seqlens_k"], None)
        for t in range(bounds[i], bounds[i + 1]):
            listed = kwargs["topk_indices"]
            every = torch.arange(n - (bounds[i + 1] - 1 - t))
            lists.append(rows[every if listed is None else listed[t][listed[t] >= 0].long()])
    return lists


def results(kwargs: dict[str, Any], d_kl: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    leaves = with_grad(kwargs, LEAVES)
    kl = ops.indexer_kl(**leaves)
    kl.backward(cotangent("out", kl) if d_kl is None else d_kl)
    return {"kl": kl.detach(), **{f"d_{name}": leaves[name].grad for name in LEAVES}}


def check_against_the_oracle(kwargs: dict[str, Any]) -> None:
    got, exact = results(kwargs), with_grad(kwargs, LEAVES, F64)
    want = reference.indexer_kl(**exact, exact=True)
    assert got["kl"].dtype == F32 and all(got[f"d_{name}"].dtype == kwargs[name].dtype for name in LEAVES)
    d_kl = cotangent("out", got["kl"])
    if want.numel() == 0:
        assert not any(got[f"d_{name}"].any() for name in LEAVES)
        return
    want.backward(d_kl.to(F64))
    bounds = KlBounds(kwargs, lists_of(kwargs), d_kl)
    assert_within(got["kl"], want, bounds.kl, "kl")
    for name in LEAVES:
        u, grad = U32 if name == "index_weights" else UNIT[kwargs[name].dtype], exact[name].grad
        assert_within(
            got[f"d_{name}"], grad, 1.01 * getattr(bounds, f"d_{name}") + 1.01 * u * grad.abs() + TINY, f"d_{name}"
        )


@pytest.mark.parametrize("case", cases("indexer_kl", wild=False), ids=str)
def test_values_and_gradients_against_the_oracle(case: Case) -> None:
    check_against_the_oracle(case.make())


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_below_their_blocks_maximum_and_above_it(dtype: torch.dtype) -> None:
    """Index scores that rise, and fall, by hundreds from block to block: the running maximum moves, or never does."""
    for sign in (1, -1):
        kwargs = indexer_kl_operands([2], [200], 2, 16, 2, 16, None, dtype)
        ramp = torch.arange(200)[:, None] * torch.ones(16) / 16
        kwargs.update(
            index_q=torch.ones(2, 2, 16, dtype=dtype),
            index_k=ramp.to(dtype),
            index_weights=torch.full((2, 2), sign * 0.5),
        )
        check_against_the_oracle(kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_lists_of_all_keys_are_no_lists(dtype: torch.dtype, data: st.DataObject) -> None:
    q_lens = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=3), "queries")
    seq_lens = [q + data.draw(st.integers(0, 150), "cached") for q in q_lens]
    A, Hi = data.draw(st.sampled_from([(1, 1), (4, 6), (9, 4), (3, 40)]), "heads")
    Dk, Di = data.draw(st.sampled_from([(16, 16), (40, 24), (33, 32)]), "widths")
    listed = indexer_kl_operands(q_lens, seq_lens, A, Dk, Hi, Di, 10**6, dtype)
    padded = torch.nn.functional.pad(listed["topk_indices"], (0, data.draw(st.integers(0, 70), "padding")), value=-1)
    want = results({**listed, "topk_indices": None})
    for name, tensor in results({**listed, "topk_indices": padded}).items():
        assert same_bits(tensor, want[name]), name


@pytest.mark.parametrize("top_k", [None, 30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_x2_a_sequence_stands_alone(dtype: torch.dtype, top_k: int | None) -> None:
    """kl and gradients of a sequence alone, and between others, of which one has a NaN everywhere."""
    lens = [(40, 70), (30, 80), (5, 5)]
    kwargs = indexer_kl_operands([q for q, _ in lens], [k for _, k in lens], 5, 24, 3, 20, top_k, dtype)
    for tensor in kwargs.values():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor[-5:] = NAN
    full = results(kwargs)
    d_kl, q_at, k_at = cotangent("out", full["kl"]), 0, 0
    for i, (queries, keys) in enumerate(lens[:2]):
        q, k = slice(q_at, q_at + queries), slice(k_at, k_at + keys)
        q_at, k_at = q.stop, k.stop
        alone = {name: kwargs[name][k if name in ("index_k", "kv") else q] for name in (*LEAVES, "q", "kv", "lse")}
        alone.update(cu_seqlens_q=offsets_of([queries]), seq_lens=kwargs["seq_lens"][i : i + 1], scale=kwargs["scale"])
        alone.update(cu_seqlens_k=offsets_of([keys]), topk_indices=None if top_k is None else kwargs["topk_indices"][q])
        for name, tensor in results(alone, d_kl[q]).items():
            assert same_bits(tensor, full[name][k if name == "d_index_k" else q]), name
        assert not any(tensor.isnan().any() for tensor in results(alone, d_kl[q]).values())


@pytest.mark.parametrize("top_k", [None, 25])
def test_x2_a_token_stands_alone(top_k: int | None) -> None:
    """A token alone, behind cached keys, has the kl and the query gradients of its sequence."""
    kwargs = indexer_kl_operands([70], [90], 5, 24, 3, 20, top_k, BF16)
    full = results(kwargs)
    d_kl = cotangent("out", full["kl"])
    for t in (0, 43, 44, 69):
        one = {**kwargs, "cu_seqlens_q": offsets_of([1]), "seq_lens": torch.tensor([21 + t], dtype=I32)}
        for name in ("index_q", "index_weights", "q", "lse", *([] if top_k is None else ["topk_indices"])):
            one[name] = kwargs[name][t : t + 1]
        got = results(one, d_kl[t : t + 1])
        for name in ("kl", "d_index_q", "d_index_weights"):
            assert same_bits(got[name][0], full[name][t]), (name, t)


@pytest.mark.parametrize("top_k", [None, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_that_a_token_does_not_list_are_not_read(dtype: torch.dtype, top_k: int | None) -> None:
    kwargs = indexer_kl_operands([8], [100], 3, 16, 4, 8, top_k, dtype)
    clean = results(kwargs)
    named = torch.zeros(100, dtype=torch.bool)
    for rows in lists_of(kwargs)[:3]:
        named[rows] = True
    assert not named.all()
    with torch.no_grad():
        kwargs["kv"][~named], kwargs["index_k"][~named] = NAN, NAN
    dirty = results(kwargs)
    for name in ("kl", "d_index_q", "d_index_weights"):
        assert same_bits(dirty[name][:3], clean[name][:3]), name
    assert dirty["kl"][3:].isnan().any()


def test_p_is_not_divided_by_its_sum() -> None:
    """With lse too large by log 2, p sums to one half: the loss is that of the halves, and so is its gradient."""
    kwargs = indexer_kl_operands([3], [70], 2, 16, 2, 8, None, F32)
    kwargs["lse"] = kwargs["lse"] + 0.6931472
    check_against_the_oracle(kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_gradient_leaves_through_the_main_attention(dtype: torch.dtype) -> None:
    kwargs = with_grad(indexer_kl_operands([4], [9], 3, 16, 2, 8, None, dtype), ("q", "kv", "lse"))
    assert not ops.indexer_kl(**kwargs).requires_grad
    kwargs = with_grad(kwargs, LEAVES)
    ops.indexer_kl(**kwargs).sum().backward()
    assert all(kwargs[name].grad is None for name in ("q", "kv", "lse"))
    assert all(kwargs[name].grad is not None for name in LEAVES)


def test_empty_lists() -> None:
    kwargs = indexer_kl_operands([4], [6], 3, 16, 2, 8, 3, F32)
    kwargs["topk_indices"][1] = -1
    got = results(kwargs)
    assert got["kl"][1] == 0 and not got["d_index_q"][1].any() and not got["d_index_weights"][1].any()
    got = results({**kwargs, "topk_indices": torch.empty(4, 0, dtype=I32)})
    assert not any(tensor.any() for tensor in got.values())


@pytest.mark.parametrize("top_k", [None, 5500])
def test_many_tokens_and_ranges_of_keys(top_k: int | None) -> None:
    """More tokens than the workspace holds at a time (32 MB), since one sequence is long; keys of many ranges."""
    lens = [(1, 6000), (400, 400)]
    kwargs = indexer_kl_operands([q for q, _ in lens], [k for _, k in lens], 1, 8, 4, 8, top_k, F32)
    assert 401 * -(-(top_k or 6000) // 64) * 4 * 64 * 4 > 32 << 20
    whole = results(kwargs)
    d_kl, late = cotangent("out", whole["kl"]), torch.arange(401) >= 300
    # The tokens in two parts, whose gradients add up: the same products in another order.
    parts = [results(kwargs, torch.where(part, d_kl, 0.0)) for part in (~late, late)]
    for name in ("d_index_q", "d_index_weights"):
        assert same_bits(torch.cat((parts[0][name][~late], parts[1][name][late])), whole[name])
    total = sum(part["d_index_k"].double() for part in parts)
    assert_within(whole["d_index_k"], total, 3 * KlBounds(kwargs, lists_of(kwargs), d_kl).d_index_k)


def test_gradient_steps_teach_the_indexer() -> None:
    """Plain descent on the indexer's inputs takes most of the KL of a random attention pattern."""
    kwargs = indexer_kl_operands([16], [16], 2, 16, 4, 8, None, F32, scale=0.5)
    leaves = with_grad(kwargs, LEAVES)
    before = ops.indexer_kl(**leaves).mean().item()
    for _ in range(300):
        for name in LEAVES:
            leaves[name].grad = None
        ops.indexer_kl(**leaves).sum().backward()
        with torch.no_grad():
            for name in LEAVES:
                leaves[name] -= 0.1 * leaves[name].grad
    assert ops.indexer_kl(**leaves).mean().item() < 0.1 * before


def test_an_indexer_that_agrees_has_no_loss() -> None:
    """One head on each side and scores that are equal: the KL is rounding alone, and so are its gradients."""
    # All products are above 0, where relu is the identity.
    q, k = values(20, 1, 8, scale=0.5).abs(), values(20, 8, seed=1, scale=0.5).abs()
    cu, lens = offsets_of([20]), torch.tensor([20], dtype=I32)
    rows = {"cu_seqlens_q": cu, "seq_lens": lens, "cu_seqlens_k": cu, "scale": 1.0}
    lse = ops.attention(q, k[:, None], None, **rows, v_dim=8, return_lse=True).lse
    index = {"index_q": q, "index_weights": torch.ones(20, 1), "index_k": k}
    got = results({**rows, **index, "q": q, "kv": k, "lse": lse, "topk_indices": None})
    assert got["kl"].abs().max() < 40 * U32 * lse.abs().max()
    assert max(got[f"d_{name}"].abs().max() for name in LEAVES) < 1e-5


GOOD = indexer_kl_operands([1, 2], [3, 2], 4, 8, 2, 6, 2, F32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"index_q": torch.zeros(3, 2, 6, dtype=torch.float16)}, "index_q: expected dtype"),
        ({"index_q": torch.zeros(3, 12)}, "index_q: expected 3 dim"),
        ({"index_q": torch.zeros(3, 0, 6), "index_weights": torch.zeros(3, 0)}, "index_q of at least one head"),
        ({"index_weights": torch.zeros(3, 2, dtype=BF16)}, "index_weights: expected dtype"),
        ({"index_weights": torch.zeros(3, 3)}, "index_weights: expected size 2"),
        ({"index_k": torch.zeros(5, 7)}, "index_k: expected size 6"),
        ({"index_k": torch.zeros(4, 6)}, "kv: expected size 4"),
        ({"index_k": torch.zeros(5, 6, dtype=BF16)}, "index_k: expected dtype"),
        ({"q": torch.zeros(2, 4, 8)}, "q: expected size 3"),
        ({"q": torch.zeros(3, 4, 8, dtype=BF16)}, "q: expected dtype"),
        ({"kv": torch.zeros(5, 9)}, "kv: expected size 8"),
        ({"lse": torch.zeros(3, 3)}, "lse: expected size 4"),
        ({"lse": torch.zeros(3, 4, dtype=F64)}, "lse: expected dtype"),
        ({"scale": NAN}, "scale"),
        ({"topk_indices": torch.zeros(3, 2)}, "topk_indices: expected dtype"),
        ({"topk_indices": torch.zeros(2, 2, dtype=I32)}, "topk_indices: expected size 3"),
        ({"topk_indices": torch.tensor([[0, 1], [0, -1], [1, 0]], dtype=I32)}, r"ascending topk_indices, or -1: got 0"),
        ({"topk_indices": torch.tensor([[0, 1], [0, 1], [0, 1]], dtype=I32)}, "below 1, the keys that row 1 sees"),
        ({"topk_indices": torch.tensor([[-1, 1], [0, -1], [0, 1]], dtype=I32)}, "-1 behind the first -1"),
        ({"seq_lens": torch.tensor([4, 2], dtype=I32)}, r"seq_lens\[0\] <= 3"),
        ({"cu_seqlens_q": torch.tensor([0, 1, 2], dtype=I32)}, r"cu_seqlens_q\[-1\] == 3"),
    ],
)
def test_bad_arguments_are_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ops.indexer_kl(**{**GOOD, **change})


def test_the_shape_of_glm5() -> None:
    check_against_the_oracle(indexer_kl_operands([3], [300], 64, 576, 32, 128, 200, BF16, scale=256**-0.5))
