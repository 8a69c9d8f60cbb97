"""sample: the tokens of its oracle, bit for bit; CDF edges; exact sets; frequencies; penalties; X1, X2; errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmx import ops, reference
from glmx.reference.sample import DRAW_DRAFT, coin, kept_tokens, ruled
from tests.ops.cases import INF, NAN, Case, cases, few_values, histories, ids, sampling_rules, values

I64, F64 = torch.int64, torch.float64
GLM_VOCABULARY = 151_552


@pytest.mark.parametrize("case", cases("sample"), ids=str)
def test_tokens_of_the_oracle(case: Case) -> None:
    kwargs = case.make()
    got, want = ops.sample(**kwargs), reference.sample(**kwargs)
    assert got.dtype == I64 and got.shape == kwargs["logits"].shape[:-1]
    assert torch.equal(got, want)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_row_is_that_of_the_oracle(data: st.DataObject) -> None:
    V = data.draw(st.sampled_from([1, 2, 17, 48, 49, 130, 1024, 1400, 2100]), "V")
    kind = data.draw(st.sampled_from([values, few_values]), "kind")
    scale = data.draw(st.sampled_from([0.0, 0.01, 1.0, 3.0, 20.0, 1e38]), "scale")
    kwargs: dict[str, Any] = {
        "logits": kind(2, V, seed=data.draw(st.integers(0, 99))) * scale,
        "seeds": data.draw(st.integers(-(2**63), 2**63 - 1), "seed"),
        "positions": torch.tensor([data.draw(st.integers(0, 2**62), "position"), 3]),
        "temperature": data.draw(st.sampled_from([0.0, 1e-30, 1e-3, 0.7, 1.0, 4.0, 1e30]), "temperature"),
        "top_k": data.draw(st.sampled_from([0, 1, 2, 20, 500, V, V + 1]), "top_k"),
        "top_p": data.draw(st.sampled_from([1.0, 1 - 2**-24, 0.999, 0.9, 0.4, 1e-9]), "top_p"),
        "min_p": data.draw(st.sampled_from([0.0, 1e-9, 0.05, 0.6, 1.0]), "min_p"),
    }
    if data.draw(st.booleans(), "ruled"):
        kwargs |= histories(2, V=V, seed=data.draw(st.integers(0, 9)))
    assert torch.equal(ops.sample(**kwargs), reference.sample(**kwargs))


@pytest.mark.parametrize("scale", [0.5, 3.0, 12.0])  # flat, between, peaked
def test_the_vocabulary_of_glm(scale: float) -> None:
    logits = values(1, GLM_VOCABULARY, scale=scale).expand(8, -1)
    rules = {
        "temperature": torch.tensor([1.0, 1.0, 1.0, 0.6, 1.0, 1.0, 1.0, 0.0]),
        "top_k": torch.tensor([0, 0, 50, 50, 5000, 0, 0, 0]),
        "top_p": torch.tensor([1.0, 0.95, 1.0, 0.95, 0.5, 1 - 2**-20, 0.9, 1.0]),
        "min_p": torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.01, 0.0]),
    }
    kwargs = {"logits": logits, "seeds": torch.arange(8), "positions": 77, **rules}
    assert torch.equal(ops.sample(**kwargs), reference.sample(**kwargs))


@pytest.mark.parametrize("V", [1, 3, 1000, 1 << 16, 1 << 20])
def test_edges_of_the_cdf(V: int) -> None:
    """V equal logits: the token is floor(u * V); where u * V is a whole number, the edge belongs to the token above."""
    draws = 64 if V < 1 << 20 else 300
    got = torch.cat([ops.sample(torch.zeros(1, V), seeds=s, positions=5) for s in range(draws)])
    want = [coin(s, 5) * V >> 24 for s in range(draws)]
    assert got.tolist() == want
    if V == 1 << 20:
        assert sum(coin(s, 5) % 16 == 0 for s in range(draws)) > 5, "no coin lies on an edge"


def test_cdf_against_fp64() -> None:
    """u lies between the exact running sums before and after the drawn token, up to the error of a mass.

    |z| <= 24: two roundings of it, one ulp of the exponential, half a unit of 2^-42 for each of 500 tokens.
    """
    logits = values(400, 500, scale=4.0)
    got = ops.sample(logits, seeds=torch.arange(400), positions=9, temperature=0.8)
    running = torch.softmax(logits.to(F64) / 0.8, 1).cumsum(1)
    u = torch.tensor([coin(s, 9) * 2.0**-24 for s in range(400)], dtype=F64)
    error = 2.0**-24 + 2 * (24 * 2 * 2.0**-24 + 2.0**-23) + 500 * 2.0**-43
    upper = running.gather(1, got[:, None])[:, 0]
    lower = torch.cat((torch.zeros(400, 1, dtype=F64), running), 1).gather(1, got[:, None])[:, 0]
    assert bool((lower - error <= u).all()) and bool((u < upper + error).all())


def drawn_set(logits: torch.Tensor, draws: int, **kwargs: Any) -> set[int]:
    return set(ops.sample(logits.expand(draws, -1), seeds=torch.arange(draws), positions=1, **kwargs).tolist())


@pytest.mark.parametrize("top_k", [2, 16, 100, 400])
@pytest.mark.parametrize("kind", [values, few_values])
def test_top_k_sets_are_those_of_a_stable_sort(kind: Any, top_k: int) -> None:
    """At temperature 1e30 all that is kept is equally likely, so draws show the whole set."""
    logits = kind(1, 1500, seed=top_k)
    order = torch.sort(logits[0], descending=True, stable=True).indices
    assert drawn_set(logits, 12 * top_k, top_k=top_k, temperature=1e30) == set(order[:top_k].tolist())


def test_a_nan_is_the_last_choice() -> None:
    logits = torch.tensor([[NAN, 1.0, NAN, 1.5, -1.0, NAN, -INF, 0.5]])
    flat = {"temperature": 1e30}
    assert drawn_set(logits, 100, top_k=3, **flat) == {1, 3, 7}
    assert drawn_set(logits, 100, top_k=4, **flat) == drawn_set(logits, 100, top_k=7, **flat) == {1, 3, 4, 7}
    assert drawn_set(logits, 100, top_p=0.75, **flat) == {1, 3, 7}
    assert drawn_set(logits, 100, min_p=1.0) == {3}


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.5, 4), (0.5 + 2**-24, 5), (0.5 - 2**-24, 4), (1e-9, 1), (1 - 2**-24, 8)]
)
def test_top_p_sets_end_exactly_on_an_edge(top_p: float, kept: int) -> None:
    """Eight equal tokens among lower ones without mass: the prefix that reaches top_p, ties to the lower id."""
    logits = torch.full((1, 300), -100.0)
    high = torch.tensor([3, 17, 18, 60, 100, 160, 255, 299])
    logits[0, high] = 2.0
    assert drawn_set(logits, 400, top_p=top_p) == set(high[:kept].tolist())
    assert drawn_set(logits, 400, top_p=top_p, top_k=50) == set(high[:kept].tolist())


def test_a_nucleus_is_rounded_up_to_a_whole_unit() -> None:
    """Two tokens of 2^42 and 2^18 + 1 units: 1 - 2^-24 of them is 2^42 + 0.98, which the first alone does not reach.
    The last coin of all, which seed 33154074 has at position 100, shows whether the second one stayed.
    """
    units, seed = 2**18 + 1, 33154074
    assert coin(seed, 100) == 2**24 - 1
    low = torch.tensor(math.log(units * 2.0**-42))
    for _ in range(20):
        logits = torch.stack((torch.zeros(()), low))
        mass = kept_tokens(ruled(logits), 1.0, 0, 1.0, 0.0).mass.tolist()
        if mass == [2**42, units]:
            break
        low = torch.nextafter(low, torch.tensor(0.0 if mass[1] < units else -20.0))
    assert mass == [2**42, units]
    assert ops.sample(logits, seeds=seed, positions=100, top_p=1 - 2**-24).item() == 1


def test_top_p_sets_against_fp64() -> None:
    """Where no running sum lies within the error of a mass of top_p, the set is that of an fp64 sort."""
    found = 0
    for seed in range(20):
        logits = values(1, 200, seed=seed, scale=2.0)
        probs, order = torch.softmax(logits[0].to(F64), 0).sort(descending=True, stable=True)
        running = probs.cumsum(0)
        if bool(((running - 0.7).abs() < 1e-5).any()):
            continue
        found += 1
        n = int((running < 0.7).sum()) + 1
        kept = kept_tokens(ruled(logits[0]), 1.0, 0, 0.7, 0.0)
        assert set(kept.ids.tolist()) == set(order[:n].tolist())
        assert drawn_set(logits, 300, top_p=0.7) <= set(order[:n].tolist())
    assert found > 10


def test_min_p_is_in_relation_to_the_most_likely() -> None:
    logits = torch.log(torch.tensor([[0.02, 0.4, 0.19, 0.21, 0.18]]))
    assert drawn_set(logits, 200, min_p=0.5) == {1, 3}
    assert drawn_set(logits, 200, min_p=0.46) == {1, 2, 3}
    assert drawn_set(logits, 200, min_p=1.0) == {1}
    # min_p acts before top_p: half of what {1, 3} have
    assert drawn_set(logits, 200, min_p=0.5, top_p=0.6) == {1}


def test_greedy_rows() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [-0.0, 0.0, -1.0], [NAN, -1.0, NAN], [-INF] * 3, [NAN] * 3, [1, INF, INF]])
    want = [1, 0, 1, 0, 0, 1]
    for rules in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}):
        assert ops.sample(logits, seeds=3, positions=0, **rules).tolist() == want
    far = torch.zeros(1, 5000)
    far[0, 4999] = far[0, 3000] = 1e-30
    assert ops.sample(far, seeds=3, positions=0, temperature=0.0).tolist() == [3000]


ODD_ROWS = [
    [-INF] * 5,
    [NAN] * 5,
    [INF] * 5,
    [NAN, -INF, NAN, -INF, NAN],
    [INF, NAN, -INF, INF, 0.0],
    [-INF, 0.0, NAN, 1.0, 2.0],
    [3.4e38, -3.4e38, 3.4e38, 0.0, -1e38],
    [-3.4e38] * 5,
    [1e-45, -1e-45, 0.0, -0.0, -1e-40],
]


@pytest.mark.parametrize("V", [1, 5])
@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1.0, 1e30])
def test_odd_rows_under_extreme_rules(temperature: float, V: int) -> None:
    """No row is without a token, and none is outside the vocabulary; the smallest and largest of every rule."""
    logits = torch.tensor(ODD_ROWS)[:, :V]
    bans = {"bias_ids": torch.arange(V), "bias_values": torch.full((V,), -INF), "bias_spans": torch.tensor([0, V])}
    for top_k in (0, 2, 2**63 - 1):
        for top_p in (1e-50, 0.5, 1 - 2**-24, 1.0):
            for min_p in (0.0, 1e-50, 1.0):
                rules = {"temperature": temperature, "top_k": top_k, "min_p": min_p}
                for seed in (-(2**63), 2**63 - 1):
                    kwargs = {"logits": logits, "seeds": seed, "positions": torch.arange(9) + 2**63 - 9, **rules}
                    got = ops.sample(**kwargs, top_p=top_p)
                    want = reference.sample(**kwargs, top_p=max(top_p, 2**-149))
                    assert torch.equal(got, want)
                everything = ops.sample(**kwargs, top_p=top_p, **bans)
                assert bool(((everything >= 0) & (everything < V)).all())


def test_an_empty_history_and_an_empty_bias_change_nothing() -> None:
    logits, none = values(6, 40), torch.empty(0, dtype=I64)
    plain = {"logits": logits, "seeds": torch.arange(6), "positions": 2}
    rules = {"token_ids": none, "history": torch.tensor([0, 0, 0]), "repetition_penalty": 2.0, "presence_penalty": 1.0}
    rules |= {"bias_ids": none, "bias_values": torch.empty(0), "bias_spans": torch.tensor([0, 0])}
    assert torch.equal(ops.sample(**plain, **rules), ops.sample(**plain))


def test_no_rows() -> None:
    for lead in ((0,), (2, 0), (0, 3)):
        ids_ = ops.sample(torch.zeros(*lead, 7), seeds=0, positions=0, top_p=0.5)
        assert ids_.shape == lead and ids_.dtype == I64


@pytest.mark.parametrize("rules", [{}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.6, "min_p": 0.05}])
def test_a_million_draws_follow_the_distribution(rules: dict) -> None:
    """Chi-square; the seed is fixed, so this is no coin toss."""
    logits, n = torch.log(torch.tensor([0.3, 0.02, 0.08, 0.25, 0.1, 0.15, 0.07, 0.03])), 1_000_000
    got = ops.sample(logits.expand(n, -1), seeds=12, positions=torch.arange(n), **rules)
    kept = kept_tokens(ruled(logits), **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **rules})
    expected = torch.zeros(8, dtype=F64).index_put((kept.ids,), kept.mass.to(F64) / int(kept.mass.sum())) * n
    counts = torch.bincount(got, minlength=8).to(F64)
    assert bool((counts[expected == 0] == 0).all())
    live = expected > 0
    chi_square = float(((counts - expected)[live] ** 2 / expected[live]).sum())
    freedom = int(live.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 6


def test_penalties_by_hand() -> None:
    """vLLM's order: repetition for every token seen, frequency and presence for generated ones."""
    logits = torch.tensor([[2.0, -1.0, 4.0, 0.5, 3.0]])
    rules = {"repetition_penalty": 2.0, "presence_penalty": 0.25, "frequency_penalty": 0.5}
    token_ids, history = torch.tensor([2, 1, 4, 4, 0]), torch.tensor([[0, 2, 5]])
    want = torch.tensor([[1.0 - 0.5 - 0.25, -2.0, 2.0, 0.5, 1.5 - 1.0 - 0.25]])
    assert torch.equal(ruled(logits[0], [2, 1], [4, 4, 0], (2.0, 0.25, 0.5)).float(), want[0])
    for seed in range(50):
        plain = ops.sample(want, seeds=seed, positions=0)
        got = ops.sample(logits, seeds=seed, positions=0, token_ids=token_ids, history=history, **rules)
        assert torch.equal(got, plain)


def test_bias_bans_forces_and_adds_up() -> None:
    logits, spans = torch.tensor([[1.0, 5.0, 0.0, 0.0]]), torch.tensor([[0, 2]])
    bias = lambda tokens, numbers: {"bias_ids": torch.tensor(tokens), "bias_values": torch.tensor(numbers)}
    greedy = {"seeds": 0, "positions": 0, "temperature": 0.0, "bias_spans": spans}
    assert ops.sample(logits, **greedy, **bias([1, 0], [-INF, 0.0])).item() == 0
    assert ops.sample(logits, **greedy, **bias([3, 3], [3.0, 3.0])).item() == 3
    assert ops.sample(logits, **greedy, **bias([3, 2], [3.0, 6.0])).item() == 2
    for rules in ({}, {"top_k": 2}, {"top_p": 0.999}):  # OpenAI's ends: -100 bans, 100 leaves nothing else
        assert 1 not in drawn_set(logits, 300, bias_spans=spans[0], **bias([1, 1], [-100.0, 0.0]), **rules)
        assert drawn_set(logits, 300, bias_spans=spans[0], **bias([2, 2], [100.0, 0.0]), **rules) == {2}


def test_rows_of_drafts_share_one_history() -> None:
    """Rows [B, K+1] whose spans grow by a draft each give what rows with lists of their own give."""
    B, K, V = 3, 4, 60
    logits = values(B, K + 1, V, scale=2.0)
    own = [ids(9 + 3 * b, high=V, seed=b) for b in range(B)]
    drafts = ids(B, K, high=V, seed=8)
    token_ids = torch.cat([torch.cat((own[b], drafts[b])) for b in range(B)])
    begin = torch.tensor([0, 9 + K, 9 + K + 12 + K])
    end = begin + torch.tensor([9, 12, 15])
    history = torch.stack(
        torch.broadcast_tensors(begin[:, None], begin[:, None] + 4, end[:, None] + torch.arange(K + 1)), -1
    )
    rules = {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.5, "temperature": 0.9}
    positions = torch.arange(K + 1) + 20
    got = ops.sample(
        logits, seeds=torch.arange(B)[:, None], positions=positions, token_ids=token_ids, history=history, **rules
    )
    for b in range(B):
        for j in range(K + 1):
            mine = torch.cat((own[b], drafts[b, :j]))
            alone = ops.sample(
                logits[b, j],
                seeds=b,
                positions=20 + j,
                token_ids=mine,
                history=torch.tensor([0, 4, len(mine)]),
                **rules,
            )
            assert int(alone) == int(got[b, j])


def test_x2_a_row_depends_on_itself_alone() -> None:
    kwargs = {"logits": values(40, 300, scale=3.0), **sampling_rules(40, V=300), **histories(40, V=300)}
    want = ops.sample(**kwargs)
    per_row = ("logits", "seeds", "positions", "temperature", "top_k", "top_p", "min_p", "history", "bias_spans")
    per_row += ("repetition_penalty", "frequency_penalty")
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = {k: v[order] if k in per_row else v for k, v in kwargs.items()}
    assert torch.equal(ops.sample(**shuffled), want[order])
    for r in (0, 13, 39):
        alone = {k: v[r : r + 1] if k in per_row else v for k, v in kwargs.items()}
        assert int(ops.sample(**alone)) == int(want[r])


def test_x1_threads(restore_threads: None) -> None:
    kwargs = {"logits": values(30, 2500, scale=3.0), **sampling_rules(30, V=2500), **histories(30, V=2500)}
    torch.set_num_threads(1)
    want = ops.sample(**kwargs)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(ops.sample(**kwargs), want)


def test_the_coin_uses_seed_position_and_draw() -> None:
    logits = torch.zeros(1, 1 << 16)
    draws = {
        (seed, position, draw): int(ops.sample(logits, seeds=seed, positions=position, draw=draw))
        for seed in (0, 1, 1 << 40, -1)
        for position in (0, 1, 1 << 40)
        for draw in (0, DRAW_DRAFT, 2**32 - 1)
    }
    assert len(set(draws.values())) == len(draws)
    assert all(token == coin(*key) >> 8 for key, token in draws.items())


def test_inputs_are_left_alone() -> None:
    kwargs = {"logits": values(10, 50), **sampling_rules(10, V=50), **histories(10, V=50)}
    before = {k: v.clone() for k, v in kwargs.items() if isinstance(v, torch.Tensor)}
    ops.sample(**kwargs)
    assert all(torch.equal(kwargs[k], v) for k, v in before.items())


GOOD: dict[str, Any] = {
    "logits": torch.zeros(2, 4),
    "seeds": 0,
    "positions": 0,
    "token_ids": torch.tensor([1, 2]),
    "history": torch.tensor([0, 1, 2]),
    "bias_ids": torch.tensor([0]),
    "bias_values": torch.tensor([1.0]),
    "bias_spans": torch.tensor([0, 1]),
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logits": torch.zeros(2, 4, dtype=torch.bfloat16)}, "logits: expected dtype torch.float32"),
        ({"logits": torch.zeros(2, 0)}, r"logits: expected shape \[..., V\]"),
        (
            {"logits": torch.zeros(1, (1 << 20) + 1)},
            "logits: expected a vocabulary of 1 to 1048576 tokens: got 1048577",
        ),
        ({"seeds": [1, 2, 3]}, r"seeds: expected a shape that broadcasts to \[2\]: got \[3\]"),
        ({"seeds": torch.zeros(2)}, "seeds: expected integers: got torch.float32"),
        ({"positions": torch.zeros(2)}, "positions: expected integers"),
        ({"temperature": -1.0}, "temperature: expected 0 .greedy. or 1e-30 to 1e30: got -1 in row 0"),
        ({"temperature": [1.0, NAN]}, "temperature: .*: got nan in row 1"),
        ({"temperature": INF}, "temperature: .*: got inf"),
        ({"temperature": 1e-31}, "temperature: "),
        ({"temperature": 1e-50}, "temperature: .*: got 1.4.*e-45"),  # not 0 once it is fp32
        ({"temperature": [0.5, -1e-50]}, "temperature: .*: got -1.4.*e-45 in row 1"),
        ({"temperature": torch.tensor(1e-50, dtype=F64)}, "temperature: .*: got 1.4.*e-45"),
        ({"temperature": 1e40}, r"temperature: expected values that torch.float32 holds: got 1e\+40"),
        ({"temperature": [1e40, 1.0]}, "temperature: .*: got inf in row 0"),
        ({"seeds": 2**63}, "seeds: expected values that torch.int64 holds: got 9223372036854775808"),
        ({"seeds": [0, -(2**63) - 1]}, "seeds: expected values that torch.int64 holds"),
        ({"top_k": -1}, "top_k: expected 0 .all. or at least 1: got -1"),
        ({"top_k": torch.tensor(1.5)}, "top_k: expected integers"),
        ({"top_k": 1.5}, "top_k: expected integers"),
        ({"seeds": [1, 1.5]}, "seeds: expected integers"),
        ({"top_p": 0.0}, "top_p: expected 0 < top_p <= 1: got 0"),
        ({"top_p": [0.5, 1.5]}, "top_p: .*: got 1.5 in row 1"),
        ({"top_p": NAN}, "top_p: "),
        ({"min_p": -0.1}, "min_p: expected 0 <= min_p <= 1: got -0.1"),
        ({"min_p": NAN}, "min_p: "),
        ({"token_ids": torch.tensor([1, 4])}, r"token_ids: expected ids in \[0, 4\): got 4 at 1"),
        ({"token_ids": None}, "history: expected token_ids and history together"),
        ({"token_ids": torch.tensor([1, 2], dtype=torch.int32)}, "token_ids: expected dtype"),
        ({"history": None}, "token_ids: expected a history with it"),
        ({"history": None, "token_ids": None, "presence_penalty": 0.5}, "presence_penalty: expected a history"),
        ({"history": torch.tensor([0, 1, 3])}, "history: .* <= 2, the length of token_ids: got 0, 1, 3 in row 0"),
        ({"history": torch.tensor([[0, 1, 2], [0, 2, 1]])}, "history: .*: got 0, 2, 1 in row 1"),
        ({"history": torch.tensor([-1, 1, 2])}, "history: .*: got -1, 1, 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected a finite number > 0: got 0"),
        ({"presence_penalty": NAN}, "presence_penalty: expected a finite number"),
        ({"frequency_penalty": INF}, "frequency_penalty: expected a finite number: got inf"),
        ({"bias_ids": torch.tensor([-1])}, r"bias_ids: expected ids in \[0, 4\): got -1 at 0"),
        ({"bias_values": torch.tensor([NAN])}, "bias_values: expected numbers: got NaN at 0"),
        ({"bias_values": None}, "bias_spans: expected bias_ids, bias_values and bias_spans together"),
        ({"bias_spans": torch.tensor([0, 2])}, "bias_spans: expected 0 <= begin <= end <= 1"),
        ({"draw": -1}, "draw: expected 0 <= draw"),
    ],
)
def test_bad_arguments_are_refused(change: dict, words: str) -> None:
    ops.sample(**GOOD)
    with pytest.raises(ValueError, match=words):
        ops.sample(**{**GOOD, **change})
