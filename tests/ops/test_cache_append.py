"""cache_append: the oracle's bits, and nothing else written; slots named twice; X2; errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmx import ops, reference
from tests.ops.cases import DTYPES, Case, cases, values, wild


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bits, NaN payloads too."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


@pytest.mark.parametrize("case", cases("cache_append"), ids=str)
def test_bits_of_the_oracle(case: Case) -> None:
    kwargs, same = case.make(), case.make()
    got = ops.cache_append(**kwargs)
    assert got is kwargs["cache"]
    assert torch.equal(raw(got), raw(reference.cache_append(**same)))


@given(st.integers(0, 40), st.integers(1, 300), st.integers(1, 30), st.integers(0, 999), st.sampled_from(DTYPES))
@settings(max_examples=40, deadline=None)
def test_x2_one_call_equals_one_call_per_token(T: int, W: int, rows: int, seed: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    slots = torch.randint(-1, rows, (T,), generator=g)
    column = int(torch.randint(0, 5, (), generator=g))
    new = wild(T, W, seed=seed, dtype=dtype)
    whole = values(rows, W + 7, dtype=dtype)
    single = whole.clone()
    ops.cache_append(whole, new, slots, column)
    for t in range(T):
        ops.cache_append(single, new[t : t + 1], slots[t : t + 1], column)
    assert torch.equal(raw(whole), raw(single))


def test_rows_are_detached_and_may_be_strided() -> None:
    wide = values(4, 20).requires_grad_()
    cache = torch.zeros(4, 10)
    ops.cache_append(cache, wide[:, ::2], torch.arange(4))
    assert not cache.requires_grad and torch.equal(cache, wide.detach()[:, ::2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"slot_mapping": torch.tensor([0, 5])}, "slot_mapping in .-1, 5., the rows of the cache: got 5 at 1"),
        ({"slot_mapping": torch.tensor([-2, 0])}, "slot_mapping"),
        ({"slot_mapping": torch.tensor([0])}, "slot_mapping"),
        ({"slot_mapping": torch.tensor([0, 1], dtype=torch.int32)}, "slot_mapping"),
        ({"column": -1}, "column in .0, 4., for rows of 4 in a cache of 8 columns: got -1"),
        ({"column": 5}, "column"),
        ({"rows": torch.ones(2, 9)}, "column"),
        ({"rows": torch.ones(2, 4, dtype=torch.bfloat16)}, "cache"),
        ({"rows": torch.ones(2, 4, dtype=torch.float64)}, "rows"),
        ({"rows": torch.ones(2, 2, 2)}, "rows"),
        ({"cache": torch.zeros(5, 16)[:, ::2]}, "cache: expected a contiguous tensor"),
        ({"cache": torch.zeros(40)}, "cache"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_written(change: dict, words: str) -> None:
    good = {"cache": torch.zeros(5, 8), "rows": torch.ones(2, 4), "slot_mapping": torch.tensor([0, 1]), "column": 0}
    arguments = {**good, **change}
    with pytest.raises(ValueError, match=words):
        ops.cache_append(**arguments)
    assert (arguments["cache"] == 0).all()
