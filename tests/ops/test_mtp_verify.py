"""mtp_verify: the tokens of its oracle; plain sampling's text; rejection's distribution; coins; X1, X2; errors."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmx import ops, reference
from glmx.reference.sample import DRAW_ACCEPT, DRAW_DRAFT, DRAW_RESIDUAL, coin, kept_tokens, ruled
from tests.ops.cases import INF, NAN, Case, cases, chain_operands, ids, values, verify_operands

F64 = torch.float64
LAST_COIN = 2**24 - 1
# Seeds whose coin at position 100 is the first or the last one: found by trying all.
ENDS = {
    (0, 0): 21573060,
    (0, LAST_COIN): 33154074,
    (DRAW_ACCEPT, 0): 14200885,
    (DRAW_ACCEPT, LAST_COIN): 35031651,
    (DRAW_RESIDUAL, 0): 3895630,
    (DRAW_RESIDUAL, LAST_COIN): 17816215,
}


@pytest.mark.parametrize("case", cases("mtp_verify"), ids=str)
def test_tokens_of_the_oracle(case: Case) -> None:
    kwargs = case.make()
    got, want = ops.mtp_verify(**kwargs), reference.mtp_verify(**kwargs)
    for name in want._fields:
        assert torch.equal(getattr(got, name), getattr(want, name)), name
        assert getattr(got, name).dtype == getattr(want, name).dtype


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_chain_is_that_of_the_oracle(data: st.DataObject) -> None:
    mode = data.draw(st.sampled_from(["greedy", "sample", "rejection"]), "mode")
    kwargs = verify_operands(
        3,
        data.draw(st.integers(0, 5), "K"),
        data.draw(st.sampled_from([2, 17, 130, 1200]), "V"),
        mode,
        ruled=data.draw(st.booleans(), "ruled"),
        probs=mode == "rejection" and data.draw(st.booleans(), "probs"),
        seed=data.draw(st.integers(0, 999), "seed"),
        scale=data.draw(st.sampled_from([0.5, 3.0, 12.0]), "scale"),
    )
    got, want = ops.mtp_verify(**kwargs), reference.mtp_verify(**kwargs)
    assert all(torch.equal(getattr(got, name), getattr(want, name)) for name in want._fields)


def test_some_drafts_are_accepted_and_some_are_not() -> None:
    """What the tests above compare is not one case only."""
    for mode in ("greedy", "sample", "rejection"):
        accepted = ops.mtp_verify(**verify_operands(200, 4, 60, mode)).accepted
        assert set(accepted.tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("mode", ["greedy", "sample", "rejection"])
def test_a_chain_does_not_depend_on_those_beside_it(mode: str) -> None:
    """Chains of 1 to 5 rows, one behind the other: each gives what it gives alone, as one of its length."""
    kwargs = chain_operands(40, 4, 60, mode, probs=mode == "rejection")
    out, bounds = ops.mtp_verify(**kwargs), kwargs.pop("row_offsets").tolist()
    assert len(set(out.accepted.tolist())) >= 4
    for b, (begin, end) in enumerate(pairwise(bounds)):
        one = {name: value[begin:end] if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
        one["draft_ids"] = one["draft_ids"][:-1]
        if "draft_probs" in one:
            one["draft_probs"] = one["draft_probs"][None, :-1]
        one |= {"seeds": one["seeds"][:1], "positions": one["positions"][:1]}
        one |= {name: one[name][None] for name in ("draft_ids", "logits", "temperature", "top_k", "top_p", "min_p")}
        alone = ops.mtp_verify(**one)
        assert torch.equal(out.tokens[begin:end], alone.tokens[0]) and out.accepted[b] == alone.accepted[0]
        mine = out.packed_ids[out.packed_offsets[b] : out.packed_offsets[b + 1]]
        assert torch.equal(mine, alone.tokens[0][: len(mine)]) and len(mine) == alone.accepted[0] + 1
    assert bool((out.packed_ids[int(out.packed_offsets[-1]) :] == -1).all())


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        (torch.tensor([0, 2, 3]), "row_offsets: expected dtype torch.int32"),
        (torch.tensor([[0, 3]], dtype=torch.int32), "row_offsets: expected 1 dimensions"),
        (torch.tensor([], dtype=torch.int32), "row_offsets: expected at least one offset: got none"),
        (torch.tensor([0, 2], dtype=torch.int32), "row_offsets: expected offsets from 0 to 3: got 0 to 2"),
        (torch.tensor([1, 3], dtype=torch.int32), "row_offsets: expected offsets from 0 to 3: got 1 to 3"),
        (
            torch.tensor([0, 2, 2, 3], dtype=torch.int32),
            "row_offsets: expected a row of each sequence: got 2 and 2 at 1",
        ),
        (torch.tensor([0, 9, 3], dtype=torch.int32), "row_offsets: expected a row of each sequence: got 9 and 3 at 1"),
    ],
)
def test_bad_offsets(offsets: torch.Tensor, words: str) -> None:
    given = {"seeds": 0, "positions": torch.arange(3), "row_offsets": offsets}
    with pytest.raises(ValueError, match=words):
        ops.mtp_verify(torch.tensor([1, 1, -1]), torch.zeros(3, 5), **given)


def test_chains_have_as_many_drafts_as_rows() -> None:
    offsets = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"logits: expected shape \[2\] \+ \[V\] for draft_ids \[2\]: got \[3, 5\]"):
        ops.mtp_verify(torch.tensor([1, 1]), torch.zeros(3, 5), seeds=0, positions=0, row_offsets=offsets)
    with pytest.raises(ValueError, match=r"draft_ids: expected ids in \[0, 5\) or -1: got 5 at \[1, 0\]"):
        ops.mtp_verify(torch.tensor([1, 5, -1]), torch.zeros(3, 5), seeds=0, positions=0, row_offsets=offsets)


def test_packing() -> None:
    out = ops.mtp_verify(**verify_operands(50, 4, 60, "sample"))
    assert torch.equal(out.packed_offsets.long().diff(), out.accepted + 1) and out.packed_offsets[0] == 0
    for b in range(50):
        mine = out.packed_ids[out.packed_offsets[b] : out.packed_offsets[b + 1]]
        n = int(out.accepted[b]) + 1
        assert torch.equal(mine, out.tokens[b, :n]) and bool((out.tokens[b, n:] == -1).all())
    assert bool((out.packed_ids[int(out.packed_offsets[-1]) :] == -1).all())


@pytest.mark.parametrize("mode", ["greedy", "sample", "rejection"])
def test_rows_behind_the_chain_are_not_read(mode: str) -> None:
    """Poison behind the last token: other logits, other drafts, other rules give the same."""
    kwargs = verify_operands(60, 4, 50, mode)
    want = ops.mtp_verify(**kwargs)
    behind = torch.arange(5) > want.accepted[:, None]
    kwargs["logits"] = torch.where(behind[..., None], NAN, kwargs["logits"])
    kwargs["temperature"] = torch.where(behind, 9.0, kwargs["temperature"])
    kwargs["draft_ids"] = torch.where(behind[:, :4], 7, kwargs["draft_ids"])
    got = ops.mtp_verify(**kwargs)
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.accepted, want.accepted)


def next_logits(text: list[int], V: int = 12) -> torch.Tensor:
    """A model: logits that depend on the last two tokens."""
    return values(V, seed=97 * text[-1] + 13 * text[-2], scale=2.0)


@pytest.mark.parametrize("mode", ["greedy", "sample"])
@pytest.mark.parametrize("K", [1, 2, 5])
def test_text_is_that_of_plain_sampling(mode: str, K: int) -> None:
    """Whatever is drafted: penalties, sets and seed act as they do one token at a time."""
    rules: dict[str, Any] = {"temperature": 0.9, "top_k": 8, "top_p": 0.9, "min_p": 0.01, "seeds": 5}
    rules |= {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2}
    rules |= {"bias_ids": torch.tensor([3]), "bias_values": torch.tensor([1.0]), "bias_spans": torch.tensor([0, 1])}
    plain, prompt = [1, 2, 3], 3
    while len(plain) < 60:
        plain_rules = rules | ({"temperature": 0.0} if mode == "greedy" else {})
        history = torch.tensor([0, prompt, len(plain)])
        token = ops.sample(
            next_logits(plain), positions=len(plain), token_ids=torch.tensor(plain), history=history, **plain_rules
        )
        plain.append(int(token))
    text, g, steps = [1, 2, 3], torch.Generator().manual_seed(K), 0
    while len(text) < 60:
        good = plain[len(text) : len(text) + K]
        noise = torch.randint(0, 12, (len(good),), generator=g).tolist()
        wrong = torch.randint(0, 3, (len(good),), generator=g).tolist()
        drafts = [n if w == 0 else d for d, n, w in zip(good, noise, wrong, strict=True)]
        contexts = [text + drafts[:j] for j in range(len(drafts) + 1)]
        ends = torch.tensor([len(context) for context in contexts])
        out = ops.mtp_verify(
            torch.tensor([drafts]),
            torch.stack([next_logits(context) for context in contexts])[None],
            mode=mode,
            positions=len(text),
            token_ids=torch.tensor(contexts[-1]),
            history=torch.stack((torch.zeros_like(ends), torch.full_like(ends, prompt), ends), -1),
            **rules,
        )
        text += out.tokens[0, : int(out.accepted[0]) + 1].tolist()
        steps += 1
    assert text[:60] == plain[:60] and steps < 57, "no draft was accepted"


# --- rejection
# ---------------------------------------------------------------------------------------------------

P_ROWS = [[0.3, 0.02, 0.08, 0.25, 0.1, 0.25], [0.05, 0.5, 0.05, 0.2, 0.15, 0.05], [0.1, 0.1, 0.2, 0.2, 0.2, 0.2]]
Q_ROWS = [[0.1, 0.3, 0.2, 0.3, 0.1, 0.0], [0.2, 0.2, 0.2, 0.2, 0.1, 0.1]]
RULES = {"temperature": [1.0, 0.7, 1.3], "top_p": [1.0, 0.9, 1.0], "top_k": [0, 0, 4]}


def chi_square_is_small(counts: torch.Tensor, probs: torch.Tensor) -> bool:
    """Within 4 sigma and a bit of its mean; tokens of probability 0 never occur. Seeds are fixed."""
    expected = probs * int(counts.sum())
    live = expected > 0
    value, freedom = float(((counts - expected)[live] ** 2 / expected[live]).sum()), int(live.sum()) - 1
    return bool((counts[~live] == 0).all()) and value < freedom + 4 * math.sqrt(2 * freedom) + 6


def target_probs(rules: dict[str, list]) -> torch.Tensor:
    rows = []
    for j, p in enumerate(P_ROWS):
        kept = kept_tokens(
            ruled(torch.log(torch.tensor(p))), rules["temperature"][j], rules["top_k"][j], rules["top_p"][j], 0.0
        )
        rows.append(torch.zeros(6, dtype=F64).index_put((kept.ids,), kept.mass.to(F64) / int(kept.mass.sum())))
    return torch.stack(rows)


@pytest.mark.parametrize("rules", [{"temperature": [1.0] * 3, "top_p": [1.0] * 3, "top_k": [0] * 3}, RULES])
@pytest.mark.parametrize("drafts", ["drawn", "chosen"])
def test_a_million_verifications_follow_the_target(rules: dict, drafts: str) -> None:
    """Rejection, two drafts, per-position rules. Each token that is given out, accepted, replaced or behind the last
    draft, is distributed as the target of its position, whatever came before it.
    """
    target, counts, again, n = target_probs(rules), torch.zeros(3, 6), torch.zeros(6, 6), 100_000
    logits = torch.log(torch.tensor(P_ROWS)).expand(n, -1, -1)
    probs = torch.tensor(Q_ROWS).expand(n, -1, -1)
    accepted = torch.zeros(3)
    for part in range(10):
        seeds = torch.arange(part * n, (part + 1) * n)
        if drafts == "drawn":
            draft_ids = ops.sample(torch.log(probs), seeds=seeds[:, None], positions=torch.arange(2), draw=DRAW_DRAFT)
        else:
            draft_ids = torch.tensor([3, 1]).expand(n, -1)
        out = ops.mtp_verify(
            draft_ids,
            logits,
            mode="rejection",
            draft_probs=probs if drafts == "drawn" else None,
            seeds=seeds,
            positions=0,
            **{name: torch.tensor(value) for name, value in rules.items()},
        )
        accepted += torch.bincount(out.accepted, minlength=3)
        for j in range(3):
            given = out.tokens[:, j][out.tokens[:, j] >= 0]
            counts[j] += torch.bincount(given, minlength=6)
        both = out.accepted >= 1
        pairs = out.tokens[both, 0] * 6 + out.tokens[both, 1]
        again += torch.bincount(pairs, minlength=36).view(6, 6)
    for j in range(3):
        assert chi_square_is_small(counts[j].to(F64), target[j]), f"position {j}: {counts[j].tolist()}"
    for first in range(6):
        if again[first].sum() > 1000:
            assert chi_square_is_small(again[first].to(F64), target[1]), f"position 1 behind {first}"
    # How many: sum of min(p, q), per position; q is 1 for a draft that was chosen.
    q = torch.tensor(Q_ROWS, dtype=F64) if drafts == "drawn" else torch.eye(6, dtype=F64)[[3, 1]]
    rate = torch.minimum(target[:2], q).sum(1)
    assert abs(accepted[1:].sum() / 1e6 - rate[0]) < 4e-3 and abs(accepted[2] / 1e6 - rate[0] * rate[1]) < 4e-3


def verify_one(p: list[float], draft: int, q: list[float] | None, seed: int) -> list[int]:
    out = ops.mtp_verify(
        torch.tensor([[draft]]),
        torch.log(torch.tensor([[p, p]])),
        mode="rejection",
        draft_probs=None if q is None else torch.tensor([[q]]),
        seeds=seed,
        positions=100,
    )
    return out.tokens[0].tolist()


@pytest.mark.parametrize("q", [None, [0.0, 0.5, 0.5], [0.0, 0.0, 1.0], [NAN, 1.0, -1.0], [0.0, 0.0, 0.0]])
def test_a_draft_without_mass_is_never_accepted(q: list[float] | None) -> None:
    """Not with the lowest coin either: u * q < p is strict. Masked, outside top-k, or below the smallest mass."""
    seed = ENDS[DRAW_ACCEPT, 0]
    assert coin(seed, 100, DRAW_ACCEPT) == 0
    for dead in (0.0, 1e-30):
        for s in (seed, *range(50)):
            tokens = verify_one([0.5, 0.5, dead], 2, q, s)
            assert tokens[0] in (0, 1) and tokens[1] == -1
    assert verify_one([0.5, 0.5, 0.01], 2, q, seed)[0] == 2, "the lowest coin accepts whatever has mass"


def test_a_draft_outside_top_k_is_never_accepted() -> None:
    logits = torch.tensor([[[1.0, 0.9, 0.8]] * 2])
    for seed in (ENDS[DRAW_ACCEPT, 0], *range(50)):
        for rule in ({"top_k": 2}, {"top_p": 0.4}, {"min_p": 0.85}):
            out = ops.mtp_verify(torch.tensor([[2]]), logits, mode="rejection", seeds=seed, positions=100, **rule)
            assert int(out.accepted) == 0 and int(out.tokens[0, 0]) in (0, 1)


def test_ends_of_the_coins() -> None:
    last = ENDS[DRAW_ACCEPT, LAST_COIN]
    assert coin(last, 100, DRAW_ACCEPT) == LAST_COIN
    assert verify_one([0.25, 0.75], 1, [0.25, 0.75], last)[0] == 1, "p = q: always accepted"
    assert verify_one([0.25, 0.75], 0, [0.5, 0.5], last)[0] == 1
    assert verify_one([1.0, 0.0], 0, None, last)[0] == 0
    for end, want in ((0, 1), (LAST_COIN, 3)):  # the residual is (0, 1/4, 0, 1/4): its ends have no mass outside
        seed = ENDS[DRAW_RESIDUAL, end]
        assert coin(seed, 100, DRAW_RESIDUAL) == end
        tokens = verify_one([0.0, 0.5, 0.0, 0.5, 0.0], 0, [0.5, 0.25, 0.0, 0.25, 0.0], seed)
        assert tokens == [want, -1]
    for end, want in ((0, 1), (LAST_COIN, 3)):
        seed = ENDS[0, end]
        assert coin(seed, 100, 0) == end
        logits = torch.tensor([[-INF, 0.0, -INF, 0.0, -INF]])
        assert ops.sample(logits, seeds=seed, positions=100).item() == want


@pytest.mark.parametrize(("end", "want"), [(0, 1500), (LAST_COIN, 1600)])
def test_ends_of_the_coins_beside_tokens_without_mass(end: int, want: int) -> None:
    """Whole blocks of 1024 tokens without mass, before and behind, and lists that begin and end with such tokens."""
    logits = torch.full((1, 4000), -100.0)
    logits[0, [1500, 1600]] = 0.0
    for rules in ({}, {"top_k": 3000}, {"top_p": 1 - 2**-24}, {"min_p": 1e-30}):
        assert ops.sample(logits, seeds=ENDS[0, end], positions=100, **rules).item() == want
        for q in (None, torch.eye(4000)[None, None, 0]):
            args = {"seeds": ENDS[DRAW_RESIDUAL, end], "positions": 100, "mode": "rejection", "draft_probs": q, **rules}
            out = ops.mtp_verify(torch.tensor([[0]]), logits.expand(1, 2, 4000), **args)
            assert out.tokens.tolist() == [[want, -1]]


def test_the_final_draw_has_its_own_coin() -> None:
    """A replaced token is spread over all that is left; with the coin of the test, which was high, it would not be."""
    p, q = [0.2, 0.4, 0.4], [1.0, 0.0, 0.0]
    replaced = [t[0] for t in (verify_one(p, 0, q, s) for s in range(400)) if t[1] == -1]
    assert len(replaced) > 250 and 0.4 < replaced.count(1) / len(replaced) < 0.6 and 0 not in replaced


def test_draws_do_not_share_coins() -> None:
    assert len({coin(3, 7, draw) for draw in range(4)}) == 4


@pytest.mark.parametrize("mode", ["greedy", "sample", "rejection"])
def test_x2_a_sequence_depends_on_itself_alone(mode: str) -> None:
    """Neither its row in the batch nor how many drafts others, or it, may have changes its tokens."""
    kwargs = verify_operands(80, 4, 60, mode, ruled=True, probs=mode == "rejection")
    want = ops.mtp_verify(**kwargs)
    fixed = ("token_ids", "bias_ids", "bias_values", "mode", "presence_penalty")
    order = torch.randperm(80, generator=torch.Generator().manual_seed(2))
    got = ops.mtp_verify(**{k: v if k in fixed else v[order] for k, v in kwargs.items()})
    assert torch.equal(got.tokens, want.tokens[order])
    per_row = [k for k in kwargs if k not in (*fixed, "draft_ids", "draft_probs", "seeds", "positions")]
    for K in (0, 1, 3):
        short = {k: v[:, : K + 1] if k in per_row else v for k, v in kwargs.items()}
        short |= {k: kwargs[k][:, :K] for k in ("draft_ids", "draft_probs") if k in kwargs}
        got = ops.mtp_verify(**short)
        whole = want.accepted < K  # a refusal within the first K
        assert torch.equal(got.tokens[whole], want.tokens[whole, : K + 1])
        assert torch.equal(got.accepted, want.accepted.clamp(max=K))
        wide = {**kwargs, "draft_ids": torch.where(torch.arange(4) < K, kwargs["draft_ids"], -1)}
        assert torch.equal(ops.mtp_verify(**wide).tokens[:, : K + 1], got.tokens)


def test_x1_threads(restore_threads: None) -> None:
    for mode in ("greedy", "sample", "rejection"):
        kwargs = verify_operands(20, 3, 1300, mode, ruled=True)
        torch.set_num_threads(1)
        want = ops.mtp_verify(**kwargs)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(ops.mtp_verify(**kwargs), want, strict=True))


def test_a_chain_without_drafts_is_a_sample() -> None:
    logits = values(5, 1, 40, scale=2.0)
    rules = {"temperature": 0.8, "top_p": 0.9}
    want = ops.sample(logits[:, 0], seeds=torch.arange(5), positions=torch.arange(5) + 3, **rules)
    for mode in ("sample", "rejection"):
        args = {"seeds": torch.arange(5), "positions": torch.arange(5) + 3, "mode": mode, **rules}
        assert torch.equal(ops.mtp_verify(ids(5, 0, high=1), logits, **args).tokens[:, 0], want)
        padded = ops.mtp_verify(torch.full((5, 2), -1), logits.expand(5, 3, 40), **args)
        assert torch.equal(padded.tokens[:, 0], want) and bool((padded.accepted == 0).all())


@pytest.mark.parametrize("mode", ["greedy", "sample", "rejection"])
def test_odd_rows_and_odd_probabilities(mode: str) -> None:
    """Rows without a finite logit, all banned, a vocabulary of one; draft_probs that are none."""
    odd = torch.tensor([-INF, NAN, INF, 0.0, -1.0, 1e38, 1e-45])
    odd_probs = torch.tensor([0.0, NAN, INF, -1.0, 2.0, 1e-45, 0.5])
    for seed in range(60):
        V, g = (1, 2, 5, 49)[seed % 4], torch.Generator().manual_seed(seed)
        picks = torch.randint(7, (6, 4, V), generator=g)
        logits = odd[picks] if seed % 3 else odd[picks[..., :1]].expand(6, 4, V)
        kwargs: dict[str, Any] = {"draft_ids": torch.randint(-1, V, (6, 3), generator=g), "logits": logits}
        kwargs |= {"mode": mode, "seeds": [-(2**63), 2**63 - 1, *ENDS.values()][:6], "positions": 100}
        kwargs |= {"temperature": (1e-30, 1.0, 1e30)[seed % 3], "top_p": (1.0, 1e-9, 0.9)[seed // 3 % 3]}
        if mode == "rejection" and seed % 5:
            kwargs["draft_probs"] = odd_probs[torch.randint(7, (6, 3, V), generator=g)]
        if seed % 7 == 0:
            bans = {"bias_ids": torch.arange(V), "bias_values": torch.full((V,), -INF)}
            kwargs |= bans | {"bias_spans": torch.tensor([0, V])}
        got, want = ops.mtp_verify(**kwargs), reference.mtp_verify(**kwargs)
        assert all(torch.equal(getattr(got, name), getattr(want, name)) for name in want._fields)
        assert bool((got.tokens < V).all()) and bool((got.tokens[:, 0] >= 0).all())


def test_no_sequences() -> None:
    for K in (0, 3):
        out = ops.mtp_verify(ids(0, K, high=1), torch.zeros(0, K + 1, 7), seeds=0, positions=0)
        assert out.tokens.shape == (0, K + 1) and out.accepted.shape == (0,) and out.packed_offsets.tolist() == [0]


GOOD: dict[str, Any] = {
    "draft_ids": torch.zeros(2, 1, dtype=torch.int64),
    "logits": torch.zeros(2, 2, 4),
    "seeds": 0,
    "positions": 0,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"draft_ids": torch.zeros(2, 1, dtype=torch.int32)}, "draft_ids: expected dtype torch.int64"),
        ({"draft_ids": torch.zeros(2, dtype=torch.int64)}, "draft_ids: expected 2 dim"),
        ({"draft_ids": torch.tensor([[0], [4]])}, r"draft_ids: expected ids in \[0, 4\) or -1: got 4 at \[1, 0\]"),
        ({"draft_ids": torch.tensor([[-2], [0]])}, "draft_ids: .*: got -2"),
        ({"logits": torch.zeros(2, 4)}, "logits: expected 3 dim"),
        ({"logits": torch.zeros(2, 3, 4)}, r"logits: expected shape \[2, 2\]"),
        ({"logits": torch.zeros(2, 2, 4, dtype=F64)}, "logits: expected dtype torch.float32"),
        ({"mode": "tree"}, "mode: expected one of greedy, sample, rejection: got 'tree'"),
        ({"draft_probs": torch.zeros(2, 1, 4)}, "draft_probs: expected none but with mode rejection"),
        ({"mode": "rejection", "draft_probs": torch.zeros(2, 2, 4)}, "draft_probs: expected size 1 in dimension 1"),
        ({"mode": "rejection", "draft_probs": torch.zeros(2, 1, 4, dtype=F64)}, "draft_probs: expected dtype"),
        ({"seeds": torch.zeros(2, 2, dtype=torch.int64)}, r"seeds: expected a shape that broadcasts to \[2\]"),
        ({"positions": torch.zeros(2)}, "positions: expected integers"),
        ({"temperature": torch.tensor([[1.0, 1.0], [1.0, -1.0]])}, "temperature: .*: got -1 in row 3"),
        ({"top_p": [0.5, 0.5, 0.5]}, r"top_p: expected a shape that broadcasts to \[2, 2\]"),
    ],
)
def test_bad_arguments_are_refused(change: dict, words: str) -> None:
    ops.mtp_verify(**GOOD)
    with pytest.raises(ValueError, match=words):
        ops.mtp_verify(**{**GOOD, **change})
