"""expert_plan against its oracle (integers: equal), and the properties that a plan has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmx import ops, reference
from tests.ops.cases import Case, cases, topk_ids


@pytest.mark.parametrize("case", cases("expert_plan"), ids=str)
def test_equals_the_oracle(case: Case) -> None:
    kwargs = case.make()
    got, want = ops.expert_plan(**kwargs), reference.expert_plan(**kwargs)
    assert got._fields == want._fields
    for name, a, b in zip(want._fields, got, want, strict=True):
        assert a.dtype == torch.int32 and torch.equal(a, b), name


@given(st.integers(0, 30), st.integers(1, 5), st.integers(1, 12), st.integers(0, 999), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_plan_is_a_stable_permutation(T: int, K: int, E: int, seed: int, holes: bool) -> None:
    ids = torch.randint(-1 if holes else 0, E, (T, K), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    plan = ops.expert_plan(ids, E)
    offsets, inverse = plan.expert_offsets.tolist(), plan.inverse.flatten().tolist()
    kept = [r for r in inverse if r >= 0]
    assert sorted(kept) == list(range(offsets[-1]))
    for pair, row in enumerate(inverse):
        e = int(ids.flatten()[pair])
        assert (row == -1) == (e == -1)
        if row >= 0:
            assert offsets[e] <= row < offsets[e + 1] and int(plan.row_token[row]) == pair // K
    for e in range(E):
        rows = [r for pair, r in enumerate(inverse) if int(ids.flatten()[pair]) == e]
        assert rows == sorted(rows)
    assert (plan.row_token[offsets[-1] :] == -1).all()


def test_large_plan_is_the_same_for_every_thread_count(restore_threads: None) -> None:
    ids = topk_ids(3000, 8, 64, holes=True)
    plans = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        plans.append(ops.expert_plan(ids, 64))
    want = torch.argsort(torch.where(ids.flatten() < 0, 64, ids.flatten()), stable=True)
    for plan in plans:
        n = int(plan.expert_offsets[-1])
        assert torch.equal(plan.row_token[:n].long(), want[:n] // 8)
        assert torch.equal(plan.inverse.flatten()[want[:n]].long(), torch.arange(n))


@pytest.mark.parametrize(("T", "E"), [(40, 2500), (3000, 1), (700, 1024)])
def test_experts_beyond_and_at_a_block_of_counts(T: int, E: int) -> None:
    ids = topk_ids(T, min(E, 7), E, holes=True)
    got, want = ops.expert_plan(ids, E), reference.expert_plan(ids, E)
    for name, a, b in zip(want._fields, got, want, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"topk_ids": torch.zeros(2, 3, dtype=torch.int64)}, "topk_ids"),
        ({"topk_ids": torch.zeros(6, dtype=torch.int32)}, "topk_ids"),
        ({"topk_ids": torch.tensor([[4]], dtype=torch.int32)}, "topk_ids"),
        ({"topk_ids": torch.tensor([[-2]], dtype=torch.int32)}, "topk_ids"),
        ({"num_experts": 0}, "num_experts"),
    ],
)
def test_bad_arguments_are_refused(change: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ops.expert_plan(**{"topk_ids": torch.zeros(2, 3, dtype=torch.int32), "num_experts": 4, **change})
