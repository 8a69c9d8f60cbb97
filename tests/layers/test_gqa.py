"""attention(): causality, cached prefixes and head groups, against loops over every query."""

from __future__ import annotations

import pytest
import torch

from glmx.layers.gqa import attention
from glmx.models.batch import Batch
from glmx.models.state import ModelState

A, G, d = 6, 2, 8


def plain(q_LAd, k_SGd, v_SGd):
    """Query row i is token S - L + i and sees the keys up to itself; fp64."""
    L, S = len(q_LAd), len(k_SGd)
    out = torch.empty(L, A, d, dtype=torch.float64)
    for i in range(L):
        for a in range(A):
            seen = S - L + i + 1
            k, v = k_SGd[:seen, a // (A // G)].double(), v_SGd[:seen, a // (A // G)].double()
            out[i, a] = (k @ q_LAd[i, a].double() / d**0.5).softmax(0) @ v
    return out


def rows(tokens, heads, seed):
    return torch.randn(tokens, heads, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("lengths", [[1], [7], [3, 1, 5], [0, 4, 0], [0], []])
def test_training(lengths):
    T = sum(lengths)
    q, k, v = rows(T, A, 1), rows(T, G, 2), rows(T, G, 3)
    out = attention(q, k, v, Batch.from_lengths(lengths), None)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True) if lengths else ()
    expected = torch.cat([plain(*part) for part in parts] or [torch.empty(0, A, d).double()])
    assert out.shape == (T, A, d) and torch.allclose(out.double(), expected, atol=2e-6)


@pytest.mark.parametrize("cached, new", [([0, 0], [4, 2]), ([3, 5], [1, 1]), ([6, 0], [2, 5]), ([2, 7], [3, 0])])
def test_with_a_cache(cached, new):
    state = ModelState([{"k": (G, d), "v": (G, d)}], 3, 10, torch.float32, torch.device("cpu"))
    layer = state.layers[0]
    for plane in layer.planes.values():
        plane.fill_(float("nan"))  # pages that nobody took must not be read
    slots = [2, 0]
    before = Batch(Batch.from_lengths(cached).cu_seqlens_q, cached, slots)
    k_past, v_past = rows(sum(cached), G, 4), rows(sum(cached), G, 5)
    state.begin(before, state.lengths)
    layer.append(k=k_past, v=v_past)
    state.commit(before, state.lengths)
    batch = Batch(Batch.from_lengths(new).cu_seqlens_q, [c + n for c, n in zip(cached, new, strict=True)], slots)
    q, k, v = rows(sum(new), A, 6), rows(sum(new), G, 7), rows(sum(new), G, 8)
    state.begin(batch, state.lengths)
    out = attention(q, k, v, batch, layer).split(new)
    for i in range(2):
        keys = torch.cat([k_past.split(cached)[i], k.split(new)[i]])
        values = torch.cat([v_past.split(cached)[i], v.split(new)[i]])
        assert torch.allclose(out[i].double(), plain(q.split(new)[i], keys, values), atol=2e-6)
