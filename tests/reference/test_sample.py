"""The oracle of sample: its generator against published vectors, its rule, and X2 (a row depends on itself
alone).
"""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmx.reference.sample import coin, drawn, exp32, kept_tokens, philox4x32, ruled, sample, uniform

PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}

# Random123, tests/kat_vectors, lines "philox4x32 10": counter, key, answer.
KNOWN_ANSWERS = [
    "00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd",
    "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1",
]


@pytest.mark.parametrize("line", KNOWN_ANSWERS)
def test_philox_known_answers(line: str) -> None:
    words = [int(w, 16) for w in line.split()]
    assert philox4x32(tuple(words[:4]), tuple(words[4:6])) == tuple(words[6:])


def test_philox_seven_rounds_known_answer() -> None:
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    want = (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)
    assert philox4x32(counter, (0xA4093822, 0x299F31D0), rounds=7) == want


def test_masses_are_e_to_the_z_within_an_ulp() -> None:
    z = -torch.arange(0, 8000, dtype=torch.float64) / 100
    assert bool(((exp32(z) - z.exp()).abs() <= z.exp() * 2.0**-23).all())
    assert exp32(torch.zeros(1, dtype=torch.float64)) == 1
    assert bool((exp32(z).float().double() == exp32(z)).all())


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40))
@settings(max_examples=50, deadline=None)
def test_uniform_is_a_24_bit_fraction(seed: int, position: int) -> None:
    u = uniform(seed, position)
    assert 0 <= u < 1 and u * 2**24 == int(u * 2**24)
    assert u == uniform(seed, position)


def test_uniform_uses_every_argument() -> None:
    values = [uniform(s, p, d) for s in (0, 1, 1 << 32, -1) for p in (0, 1, 1 << 32) for d in (0, 1)]
    assert len(set(values)) == len(values)


def test_uniform_mean_and_spread() -> None:
    u = torch.tensor([uniform(7, p) for p in range(4000)], dtype=torch.float64)
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / 4000)
    assert abs(u.var() - 1 / 12) < 0.005


def test_temperature_zero_is_argmax_with_ties_to_the_lowest_id() -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor(
        [
            [0.0, 2.0, 2.0, 1.0],
            [-0.0, 0.0, -1.0, -2.0],
            [nan, -1.0, nan, -1.0],
            [-inf, -inf, -inf, -inf],
            [1, inf, inf, nan],
        ]
    )
    assert sample(logits, seeds=1, positions=0, temperature=0).tolist() == [1, 0, 1, 0, 1]


def test_top_k_one_and_small_top_p_are_argmax() -> None:
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    want = logits.argmax(1).tolist()
    assert sample(logits, seeds=list(range(8)), positions=3, top_k=1).tolist() == want
    assert sample(logits, seeds=list(range(8)), positions=3, top_p=1e-9).tolist() == want


def _frequencies(logits: torch.Tensor, draws: int, **kwargs) -> dict[int, float]:
    kept = kept_tokens(ruled(logits[0]), **{**PLAIN, **kwargs})
    return {token: n / draws for token, n in Counter(drawn(kept, coin(11, p)) for p in range(draws)).items()}


@pytest.mark.parametrize(
    ("kwargs", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 3}, [3, 0, 4]),
        ({"top_p": 0.7}, [3, 0]),
        ({"top_k": 4, "top_p": 0.9}, [3, 0, 4]),
    ],
)
def test_frequencies_follow_the_kept_softmax(kwargs: dict, kept: list[int]) -> None:
    probs = torch.tensor([0.25, 0.06, 0.04, 0.5, 0.15])
    draws = 3000
    got = _frequencies(probs.log()[None], draws, **kwargs)
    total = float(probs[kept].sum())
    assert set(got) == set(kept)
    for token in kept:
        p = float(probs[token]) / total
        assert abs(got[token] - p) < 4.5 * math.sqrt(p * (1 - p) / draws), (token, got[token], p)


def test_temperature_scales_the_logits() -> None:
    logits = torch.tensor([[0.0, math.log(2.0)]])
    got = _frequencies(logits, 3000, temperature=0.5)
    assert abs(got[1] - 0.8) < 4.5 * math.sqrt(0.16 / 3000)


def test_top_p_keeps_the_token_that_reaches_the_mass() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    assert set(_frequencies(logits, 200, top_p=0.5)) == {0, 1}
    assert set(_frequencies(logits, 200, top_p=0.51)) == {0, 1, 2}


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(0, 5), st.sampled_from([0.0, 0.3, 1.0, 4.0]))
@settings(max_examples=40, deadline=None)
def test_a_row_depends_on_itself_alone(seed: int, rows: int, place: int, temperature: float) -> None:
    g = torch.Generator().manual_seed(seed)
    others = torch.randn(rows, 37, generator=g) * 3
    row = torch.randn(1, 37, generator=g) * 3
    place = min(place, rows)
    batch = torch.cat((others[:place], row, others[place:]))
    kwargs = {"temperature": temperature, "top_k": 9, "top_p": 0.95}
    alone = sample(row, seeds=seed, positions=5, **kwargs)
    seeds = [seed + 1] * place + [seed] + [seed + 2] * (rows - place)
    together = sample(batch, seeds=seeds, positions=[5] * (rows + 1), **kwargs)
    assert int(together[place]) == int(alone[0])


def test_thread_count_does_not_matter_on_a_large_vocabulary() -> None:
    logits = torch.randn(1, 151_552, generator=torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    try:
        ids = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            ids.append([int(sample(logits, seeds=s, positions=9)) for s in range(1)])
    finally:
        torch.set_num_threads(before)
    assert ids[0] == ids[1] == ids[2]


def test_infinite_logits_share_all_the_mass() -> None:
    inf = float("inf")
    assert set(_frequencies(torch.tensor([[0.0, inf, 3.0, inf]]), 100)) == {1, 3}
    assert set(_frequencies(torch.tensor([[-inf, 0.0, float("nan")]]), 20)) == {1}


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seeds": [1, 2, 3]}, "seeds"),
    ],
)
def test_bad_values_are_refused(kwargs: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        sample(torch.zeros(2, 4), **{"seeds": 0, "positions": 0, **kwargs})
    with pytest.raises(ValueError, match="logits"):
        sample(torch.zeros(4, 0), seeds=0, positions=0)
