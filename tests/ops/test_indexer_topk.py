"""indexer_topk: its lists are those of a stable sort of the oracle's scores, bit for bit; X2, X3; ties, NaN; errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmx import ops, reference
from glmx.reference.indexer_topk import best_keys, index_scores
from tests.ops.cases import (
    BF16,
    DTYPES,
    F32,
    INF,
    NAN,
    Case,
    cases,
    few_values,
    indexer_operands,
    offsets_of,
    paged,
    values,
)
from tests.ops.checks import F64, TINY, U32, gemm_unit

I32 = torch.int32


@pytest.mark.parametrize("case", cases("indexer_topk"), ids=str)
def test_lists_of_the_oracle(case: Case) -> None:
    kwargs = case.make()
    got, want = ops.indexer_topk(**kwargs), reference.indexer_topk(**kwargs)
    assert got.dtype == I32 and got.shape == (kwargs["q"].shape[0], kwargs["top_k"])
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_shape_of_glm5_against_fp64(dtype: torch.dtype) -> None:
    """Whatever the rounding, no key is listed whose exact score is below that of one left out by more than both errors.

    Of a score: each head's product by gemm_unit, relu adds nothing, then Hi fused steps.
    """
    kwargs = indexer_operands([2], [2600], 32, 128, 2048, dtype)
    lists = ops.indexer_topk(**kwargs).long()
    q, weights, k = (kwargs[name].to(F64) for name in ("q", "weights", "k"))
    size = (weights.abs()[:, :, None] * (q.abs() @ k.abs().T)).sum(1)
    error = (gemm_unit(128) + 32 * U32) * 1.01 * size + 32 * 130 * TINY
    exact = index_scores(q, weights, k, exact=True)
    for t, n in enumerate((2599, 2600)):
        listed = torch.zeros(n, dtype=torch.bool).index_fill(0, lists[t], True)
        assert listed.sum() == 2048 and torch.equal(lists[t], lists[t].sort().values)
        worst_in = (exact[t, :n] + error[t, :n])[listed].min()
        best_out = (exact[t, :n] - error[t, :n])[~listed].max()
        assert worst_in >= best_out


def one_head(scores: list[float] | torch.Tensor, top_k: int) -> torch.Tensor:
    """The list of one row with these scores: two heads, one for their positive and one for their negative part."""
    s = torch.as_tensor(scores, dtype=F32)
    k = torch.stack((s, -s), 1)
    q = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    cu_k = offsets_of([len(s)])
    return ops.indexer_topk(q, torch.tensor([[1.0, -1.0]]), k, offsets_of([1]), cu_k[1:], top_k, cu_seqlens_k=cu_k)[0]


@pytest.mark.parametrize("top_k", [1, 30, 300, 2000])
def test_orders_of_scores(top_k: int) -> None:
    """All alike, rising (each key is better than all before it), falling, a sawtooth, two values, huge ones."""
    n = torch.arange(3000).float()
    rows = [torch.zeros(3000), torch.full((3000,), -7.0), n, -n, n % 97, (n % 7 == 3).float(), n * 1e35, values(3000)]
    for scores in rows:
        assert torch.equal(one_head(scores, top_k), best_keys(scores, top_k).int())


def test_total_order() -> None:
    assert one_head([0.0, -0.0, 0.0, -0.0], 2).tolist() == [0, 1]
    assert one_head([-1.0, -0.0, -2.0, 0.0], 2).tolist() == [1, 3]
    for weight, want in (
        (NAN, [0, 1]),
        (-INF, [0, 1]),
        (INF, [1, 2]),
    ):  # inf * relu(0) is NaN, the last choice, as -inf is
        q, k, cu_k = torch.ones(1, 1, 1), torch.tensor([[0.0], [1.0], [1.0], [-1.0]]), offsets_of([4])
        got = ops.indexer_topk(q, torch.tensor([[weight]]), k, offsets_of([1]), cu_k[1:], 2, cu_seqlens_k=cu_k)
        assert got[0].tolist() == want


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_stays_where_it_is_seen(dtype: torch.dtype) -> None:
    """A key of NaNs hurts no row before it and is the last choice of those after it; among NaNs, order decides."""
    kwargs = indexer_operands([40], [100], 3, 16, 60, dtype)
    clean = ops.indexer_topk(**kwargs)
    kwargs["k"][80] = NAN
    got = ops.indexer_topk(**kwargs)
    assert torch.equal(got[:20], clean[:20]) and not (got[20:] == 80).any()
    kwargs["q"][:] = NAN
    assert (ops.indexer_topk(**kwargs) == torch.arange(60, dtype=I32)).all()
    few = {**kwargs, "top_k": 100}
    want = torch.arange(100, dtype=I32).expand(40, -1).where(torch.arange(100) < torch.arange(61, 101)[:, None], -1)
    assert torch.equal(ops.indexer_topk(**few), want.int())


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_x2_x3_rows_stand_alone(dtype: torch.dtype, data: st.DataObject) -> None:
    """Two sequences at once; then each in random chunks, over rows or pages, beside the other or alone."""
    lens = [
        data.draw(st.integers(1, 60), "tokens") + data.draw(st.sampled_from([0, 64, 130]), "more") for _ in range(2)
    ]
    Hi, Di = data.draw(st.sampled_from([(1, 3), (4, 16), (7, 33)]), "heads")
    kind = data.draw(st.sampled_from([values, few_values]), "kind")
    top_k = data.draw(st.sampled_from([1, 20, 64, 150]), "top_k")
    full = indexer_operands(lens, lens, Hi, Di, top_k, dtype, kind=kind)
    want = ops.indexer_topk(**full)
    keys = paged(full, data.draw(st.integers(0, 99), "seed")) if data.draw(st.booleans(), "paged") else full
    starts, done, g = (
        full["cu_seqlens_q"].tolist(),
        [0, 0],
        torch.Generator().manual_seed(data.draw(st.integers(0, 99))),
    )
    while done != lens:
        step = torch.tensor([0, 1, 4, 50])[torch.randint(4, (2,), generator=g)].tolist()
        step = [min(s, n - d) for s, n, d in zip(step, lens, done, strict=True)]
        rows = torch.cat([torch.arange(starts[i] + done[i], starts[i] + done[i] + step[i]) for i in range(2)])
        done = [d + s for d, s in zip(done, step, strict=True)]
        chunk: dict[str, Any] = {
            **keys,
            "q": full["q"][rows],
            "weights": full["weights"][rows],
            "cu_seqlens_q": offsets_of(step),
            "seq_lens": torch.tensor(done, dtype=I32),
        }
        assert torch.equal(ops.indexer_topk(**chunk), want[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [values, few_values])
def test_x1_ranges_of_keys_are_merged_exactly(dtype: torch.dtype, kind: Any, restore_threads: None) -> None:
    """Few tokens over many keys: their keys are split over the threads. Ties lie in all ranges."""
    for q_len, keys, top_k in ((1, 2300, 1000), (1, 2300, 100), (3, 1500, 1499), (2, 1111, 7)):
        kwargs = indexer_operands([q_len, 1], [keys, 1300], 16, 40, top_k, dtype, kind=kind)
        want = reference.indexer_topk(**kwargs)
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(ops.indexer_topk(**kwargs), want)
            assert torch.equal(ops.indexer_topk(**paged(kwargs, 3)), want)


def test_lists_are_what_sparse_mla_takes() -> None:
    kwargs = indexer_operands([6], [90], 4, 16, 40, BF16)
    lists = ops.indexer_topk(**kwargs)
    where = {name: kwargs[name] for name in ("cu_seqlens_q", "seq_lens", "cu_seqlens_k")}
    q, kv = values(6, 2, 24, dtype=BF16), values(90, 24, seed=1, dtype=BF16)
    assert ops.sparse_mla(q, kv, lists, **where, scale=0.2, v_dim=16).isfinite().all()


def test_no_gradient() -> None:
    kwargs = indexer_operands([2], [9], 2, 8, 3, F32)
    for name in ("q", "weights", "k"):
        kwargs[name].requires_grad_()
    assert not ops.indexer_topk(**kwargs).requires_grad


GOOD = indexer_operands([1, 2], [3, 2], 4, 8, 2, F32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(3, 4, 8, dtype=torch.float16)}, "q: expected dtype"),
        ({"q": torch.zeros(3, 8)}, "q: expected 3 dim"),
        ({"q": torch.zeros(3, 0, 8), "weights": torch.zeros(3, 0)}, r"q.shape\[1\] >= 1: got 0"),
        ({"q": torch.zeros(3, 4, 0), "k": torch.zeros(5, 0)}, r"q.shape\[2\] >= 1: got 0"),
        ({"weights": torch.zeros(3, 4, dtype=BF16)}, "weights: expected dtype torch.float32"),
        ({"weights": torch.zeros(3, 5)}, "weights: expected size 4"),
        ({"k": torch.zeros(5, 8, dtype=BF16)}, "k: expected dtype"),
        ({"k": torch.zeros(5, 1, 8)}, "k: expected 2 dim"),
        ({"k": torch.zeros(5, 9)}, "k: expected size 8"),
        ({"top_k": 0}, "top_k: expected at least 1: got 0"),
        ({"cu_seqlens_k": None}, "neither"),
        ({"block_table": torch.zeros(2, 1, dtype=I32)}, "both"),
        ({"seq_lens": torch.tensor([4, 2], dtype=I32)}, r"seq_lens\[0\] <= 3"),
        ({"seq_lens": torch.tensor([3, 1], dtype=I32)}, r"seq_lens\[1\] >= 2"),
    ],
)
def test_bad_arguments_are_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ops.indexer_topk(**{**GOOD, **change})
